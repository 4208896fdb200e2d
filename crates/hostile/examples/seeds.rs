//! Writes the seeds of every fuzz target into `DIRECTORY/TARGET/`:
//! `cargo run --example seeds -- DIRECTORY` (`make fuzz` does).

use std::{env, error::Error, fs, path::PathBuf};

use transship_hostile::ENTRIES;

fn main() -> Result<(), Box<dyn Error>> {
    let into = PathBuf::from(env::args_os().nth(1).ok_or("which directory?")?);
    for entry in ENTRIES {
        let dir = into.join(entry.name);
        fs::create_dir_all(&dir)?;
        for (number, seed) in (entry.seeds)().iter().enumerate() {
            fs::write(dir.join(format!("seed-{number}")), seed)?;
        }
        println!("{}", entry.name);
    }
    Ok(())
}
