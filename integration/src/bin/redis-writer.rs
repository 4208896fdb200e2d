//! A client that keeps writing to the Redis beside it, over one TCP
//! connection for as long as it lives: `SET w:N N` for N = 1, 2, 3 …
//!
//! The connection moves with the container. What it saw is kept in Redis
//! itself: `w:acked` (the last N that Redis confirmed) and `w:gap_us` (the
//! longest time between two confirmations since `w:gap_us` was last deleted).
//! Any error ends it, so a lost connection cannot go unnoticed. Gaps are those
//! of the wall clock: CRIU restores a container into a time namespace whose
//! monotonic clock leaves the pause out.
//!
//! Usage: redis-writer [HOST:PORT [PAUSE_US]]

use std::{
    env,
    io::{self, BufRead, BufReader, Write},
    net::TcpStream,
    thread::sleep,
    time::{Duration, Instant, SystemTime},
};

fn main() -> io::Result<()> {
    let mut args = env::args().skip(1);
    let address = args.next().unwrap_or_else(|| "127.0.0.1:6379".into());
    let pause = args.next().and_then(|text| text.parse().ok()).unwrap_or(1000);
    let mut redis = Redis::connect(&address)?;
    let mut last = SystemTime::now();
    for number in 1u64.. {
        let text = number.to_string();
        redis.call(&["SET", &format!("w:{number}"), &text])?;
        redis.call(&["SET", "w:acked", &text])?;
        // A clock that was set back meanwhile tells no gap.
        let gap = last.elapsed().unwrap_or_default().as_micros() as u64;
        last = SystemTime::now();
        let longest = redis.call(&["GET", "w:gap_us"])?.and_then(|text| text.parse().ok());
        if longest.is_none_or(|longest: u64| gap > longest) {
            redis.call(&["SET", "w:gap_us", &gap.to_string()])?;
        }
        sleep(Duration::from_micros(pause));
    }
    Ok(())
}

struct Redis(BufReader<TcpStream>);

impl Redis {
    /// Waits until Redis listens.
    fn connect(address: &str) -> io::Result<Self> {
        let since = Instant::now();
        loop {
            match TcpStream::connect(address) {
                Ok(stream) => {
                    stream.set_nodelay(true)?;
                    return Ok(Self(BufReader::new(stream)));
                }
                Err(error) if since.elapsed() > Duration::from_secs(30) => return Err(error),
                Err(_) => sleep(Duration::from_millis(20)),
            }
        }
    }

    /// One command in RESP (redis.io, "Redis serialization protocol") and its
    /// reply: a simple string, a bulk string, an integer or nil.
    fn call(&mut self, words: &[&str]) -> io::Result<Option<String>> {
        let mut request = format!("*{}\r\n", words.len());
        for word in words {
            request.push_str(&format!("${}\r\n{word}\r\n", word.len()));
        }
        self.0.get_mut().write_all(request.as_bytes())?;
        let line = self.line()?;
        match line.split_at(1) {
            ("+" | ":", text) => Ok(Some(text.into())),
            ("$", "-1") => Ok(None),
            ("$", _) => self.line().map(Some),
            _ => Err(io::Error::other(format!("redis says {line}"))),
        }
    }

    fn line(&mut self) -> io::Result<String> {
        let mut line = String::new();
        if self.0.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let text = line.trim_end().to_owned();
        if text.is_empty() { Err(io::ErrorKind::InvalidData.into()) } else { Ok(text) }
    }
}
