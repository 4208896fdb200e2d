//! The parts of `bench` that run inside nodes.
//!
//! ```text
//! bench-node checkpoint stop|lazy ID IMAGES TO PAGE_SERVER
//! bench-node restore    stop|lazy ID BUNDLE IMAGES LISTEN PAGE_SERVER
//! bench-node give TO MIB STREAMS
//! bench-node take LISTEN MIB STREAMS
//! ```
//!
//! Each prints when it has done what, as `{"what":NANOSECONDS}`.
#![forbid(unsafe_code)]

use std::{
    env, fs,
    io::{BufReader, BufWriter, Read, Write, copy},
    net::{TcpListener, TcpStream},
    os::fd::AsRawFd,
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use transship_integration::bench::{criu::RUNC_ROOT, now};

/// Larger than a socket's buffer: fewer calls do not get cheaper.
const CHUNK: usize = 1 << 20;

fn main() -> Result<()> {
    let words: Vec<_> = env::args().skip(1).collect();
    let words: Vec<_> = words.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["checkpoint", kind, id, images, to, page_server] => {
            checkpoint(*kind == "lazy", id, Path::new(images), to, page_server)
        }
        ["restore", kind, id, bundle, images, listen, page_server] => {
            receive(TcpListener::bind(listen)?, Path::new(images))?;
            println!("{{\"received\":{}}}", now()?);
            match *kind {
                "lazy" => restore_lazily(id, bundle, images, page_server),
                _ => restore(id, bundle, images),
            }
        }
        ["give", to, mib, streams] => give(to, mib.parse()?, streams.parse()?),
        ["take", listen, mib, streams] => take(listen, mib.parse()?, streams.parse()?),
        _ => bail!("bench-node is started by bench; {words:?} means nothing to it"),
    }
}

// --- runc and CRIU -------------------------------------------------------------

/// As Debian has it. Not by its name: a test machine may put a wrapper before
/// it that only containers of other users need.
const CRIU: &str = "/usr/sbin/criu";

fn runc() -> Command {
    let mut runc = Command::new("runc");
    runc.args(["--criu", CRIU, "--root", RUNC_ROOT]).stdin(Stdio::null()).stdout(Stdio::null());
    runc
}

fn checkpoint(lazy: bool, id: &str, images: &Path, to: &str, page_server: &str) -> Result<()> {
    let mut runc = runc();
    runc.arg("checkpoint").arg("--image-path").arg(images).arg("--work-path").arg(images);
    if !lazy {
        succeed(&mut runc.arg(id).spawn()?)?;
        println!("{{\"dumped\":{}}}", now()?);
        return send(images, to, true);
    }
    // Not closed at exec: CRIU takes it out of runc, and says there that it
    // serves pages.
    let (ready, status) = nix::unistd::pipe()?;
    runc.args(["--lazy-pages", "--page-server", page_server, "--status-fd"]);
    let mut serving = runc.arg(status.as_raw_fd().to_string()).arg(id).spawn()?;
    drop(status);
    let mut byte = [0];
    fs::File::from(ready).read_exact(&mut byte).context("CRIU to serve pages")?;
    println!("{{\"dumped\":{}}}", now()?);
    // CRIU still needs them.
    send(images, to, false)?;
    succeed(&mut serving)
}

fn restore(id: &str, bundle: &str, images: &str) -> Result<()> {
    succeed(&mut restoring(bundle, images).arg(id).spawn()?)?;
    println!("{{\"restored\":{}}}", now()?);
    Ok(())
}

fn restore_lazily(id: &str, bundle: &str, images: &str, page_server: &str) -> Result<()> {
    let (address, port) = page_server.rsplit_once(':').context("HOST:PORT")?;
    let mut pages = Command::new(CRIU)
        .args(["lazy-pages", "--page-server", "--address", address, "--port", port])
        .args(["-D", images, "-o", "lazy-pages.log"])
        .stdin(Stdio::null())
        .spawn()?;
    let socket = Path::new(images).join("lazy-pages.socket");
    while !socket.exists() {
        ensure!(pages.try_wait()?.is_none(), "criu lazy-pages ended");
        thread::sleep(Duration::from_micros(200));
    }
    succeed(&mut restoring(bundle, images).args(["--lazy-pages", id]).spawn()?)?;
    println!("{{\"restored\":{}}}", now()?);
    succeed(&mut pages)?;
    println!("{{\"filled\":{}}}", now()?);
    Ok(())
}

fn restoring(bundle: &str, images: &str) -> Command {
    let mut runc = runc();
    runc.args(["restore", "-d", "-b", bundle, "--image-path", images, "--work-path", images]);
    runc
}

fn succeed(process: &mut Child) -> Result<()> {
    let status = process.wait()?;
    ensure!(status.success(), "a program ended with {status}");
    Ok(())
}

/// All files of a folder: length and name, length and content. Those nobody
/// needs any more make room in memory as they are sent.
fn send(dir: &Path, to: &str, remove: bool) -> Result<()> {
    let mut stream = TcpStream::connect(to)?;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if !entry.file_type()?.is_file() {
            continue;
        }
        let name = entry.file_name().into_encoded_bytes();
        let mut file = fs::File::open(entry.path())?;
        stream.write_all(&(name.len() as u64).to_ne_bytes())?;
        stream.write_all(&name)?;
        let length = file.metadata()?.len();
        stream.write_all(&length.to_ne_bytes())?;
        // By sendfile(2), where it can be; a log may still grow.
        copy(&mut (&mut file).take(length), &mut stream)?;
        if remove {
            fs::remove_file(entry.path())?;
        }
    }
    stream.write_all(&0u64.to_ne_bytes())?;
    Ok(())
}

fn receive(listener: TcpListener, dir: &Path) -> Result<()> {
    println!("listening");
    let mut stream = BufReader::with_capacity(CHUNK, listener.accept()?.0);
    loop {
        let length = number(&mut stream)?;
        if length == 0 {
            return Ok(());
        }
        let mut name = vec![0; usize::try_from(length)?];
        stream.read_exact(&mut name)?;
        let path = dir.join(String::from_utf8(name)?);
        let length = number(&mut stream)?;
        let mut file = BufWriter::with_capacity(CHUNK, fs::File::create(path)?);
        let copied = copy(&mut (&mut stream).take(length), &mut file)?;
        ensure!(copied == length, "the stream ended early");
        file.flush()?;
    }
}

fn number(stream: &mut impl Read) -> Result<u64> {
    let mut bytes = [0; 8];
    stream.read_exact(&mut bytes)?;
    Ok(u64::from_ne_bytes(bytes))
}

// --- memory to memory ----------------------------------------------------------

fn share(mib: usize, streams: usize, number: usize) -> usize {
    let chunks = mib / streams + usize::from(number < mib % streams);
    chunks * CHUNK
}

fn give(to: &str, mib: usize, streams: usize) -> Result<()> {
    let filled: Vec<_> =
        (0..streams).map(|number| vec![number as u8 + 1; share(mib, streams, number)]).collect();
    thread::scope(|scope| {
        let giving: Vec<_> = filled
            .iter()
            .map(|memory| {
                scope.spawn(move || -> Result<()> {
                    let mut stream = TcpStream::connect(to)?;
                    stream.write_all(&(memory.len() as u64).to_ne_bytes())?;
                    memory.chunks(CHUNK).try_for_each(|chunk| stream.write_all(chunk))?;
                    Ok(())
                })
            })
            .collect();
        giving.into_iter().try_for_each(join)
    })
}

fn take(listen: &str, mib: usize, streams: usize) -> Result<()> {
    let listener = TcpListener::bind(listen)?;
    println!("listening");
    let connections =
        (0..streams).map(|_| Ok(listener.accept()?.0)).collect::<Result<Vec<TcpStream>>>()?;
    let begun = Instant::now();
    let bytes = thread::scope(|scope| {
        let taking: Vec<_> = connections
            .into_iter()
            .map(|mut stream| {
                scope.spawn(move || -> Result<usize> {
                    let length = usize::try_from(number(&mut stream)?)?;
                    ensure!(length <= mib << 20, "more than was announced");
                    // Fresh memory, as a container's is that arrives.
                    let mut memory = vec![0; length];
                    for chunk in memory.chunks_mut(CHUNK) {
                        stream.read_exact(chunk)?;
                    }
                    Ok(memory.len())
                })
            })
            .collect();
        taking.into_iter().map(join).sum::<Result<usize>>()
    })?;
    println!("{{\"bytes\":{bytes},\"took_ns\":{}}}", begun.elapsed().as_nanos());
    Ok(())
}

fn join<T>(thread: thread::ScopedJoinHandle<'_, Result<T>>) -> Result<T> {
    thread.join().map_err(|_| anyhow::anyhow!("a thread panicked"))?
}
