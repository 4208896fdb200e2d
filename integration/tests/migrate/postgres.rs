//! A database that shares its memory among all its processes, none of them
//! root's: PostgreSQL, with a client that keeps writing over one connection.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use transship_integration::{agents::Site, images::Image, until};

use crate::world::{World, connections, read, with_agents};

const ID: &str = "postgres";

/// What the container runs, with `$BUFFERS` and so many `$ROWS` to begin with.
///
/// The writer is one psql that lives as long as the container and ends at any
/// error; what the database has confirmed to it is in `/tmp/acked`. Each row
/// has a checksum of its own. Nothing here is lost by a machine that fails, so
/// nothing has to be on the disk.
const SCRIPT: &str = r#"
export PGDATA=/var/lib/postgresql/data PGUSER=postgres PGDATABASE=postgres
initdb -A trust -U postgres --no-locale -E UTF8 --no-sync --wal-segsize=1 > /tmp/initdb.log
postgres -c listen_addresses=127.0.0.1 -c unix_socket_directories=/tmp -c fsync=off \
  -c shared_buffers=$BUFFERS -c huge_pages=off -c max_wal_size=16MB -c min_wal_size=2MB \
  > /tmp/postgres.log 2>&1 &
until psql -h /tmp -c 'SELECT 1' > /dev/null 2>&1; do sleep 0.1; done
psql -h /tmp -q -v ON_ERROR_STOP=1 << END || exit 1
CREATE EXTENSION amcheck;
CREATE TABLE rows (n bigint PRIMARY KEY, payload text NOT NULL, sum text NOT NULL);
ALTER TABLE rows ALTER payload SET STORAGE PLAIN;
INSERT INTO rows SELECT n, p, md5(p)
  FROM (SELECT n, repeat(md5(n::text), 30) AS p FROM generate_series(1, $ROWS) n) new;
END
n=$ROWS
while n=$((n + 1)); do
  echo "INSERT INTO rows SELECT $n, p, md5(p) FROM (SELECT repeat(md5('$n'), 30) AS p) new RETURNING n;"
done | psql -h 127.0.0.1 -q -A -t -v ON_ERROR_STOP=1 2> /tmp/writer.log | while read -r n; do
  [ -z "$n" ] || { echo "$n" > /tmp/new && mv /tmp/new /tmp/acked; }
done
"#;

/// One statement, whoever asks being none of the container's first processes.
fn psql(site: &Site, statement: &str) -> Result<String> {
    let command = ["psql", "-h", "/tmp", "-U", "postgres", "-A", "-t", "-c", statement];
    Ok(site.exec_in(ID, &command)?.ok()?.trim().to_owned())
}

fn acked(site: &Site) -> Option<u64> {
    read(site, ID, "/tmp/acked").ok()?.trim().parse().ok()
}

fn writes_beyond(site: &Site, start: u64) -> Result<u64> {
    until(&format!("a row beyond {start}"), || Ok(acked(site).filter(|last| *last > start)))
        .with_context(|| {
            let logs = ["initdb", "postgres", "writer"];
            let log = |name| read(site, ID, &format!("/tmp/{name}.log")).unwrap_or_default();
            logs.map(log).join("---\n")
        })
}

/// Every row that was confirmed is there and as it was written, the tables and
/// their indexes agree, and the writer goes on.
fn nothing_is_lost(site: &Site) -> Result<()> {
    let last = acked(site).context("nothing was ever written")?;
    let lost = format!(
        "SELECT (SELECT count(*) FROM generate_series(1, {last}) n \
           WHERE NOT EXISTS (SELECT FROM rows WHERE rows.n = n.n)), \
         (SELECT count(*) FROM rows WHERE md5(payload) <> sum OR length(payload) <> 960)"
    );
    let answer = psql(site, &lost)?;
    ensure!(answer == "0|0", "of {last} rows so many are lost, and wrong: {answer}");
    let check = ["pg_amcheck", "-h", "/tmp", "-U", "postgres", "--heapallindexed", "postgres"];
    let found = site.exec_in(ID, &check)?.ok()?;
    ensure!(found.trim().is_empty(), "{found}");
    writes_beyond(site, last).map(drop)
}

fn start(world: &World, buffers: &str, rows: u32) -> Result<()> {
    let (buffers, rows) = (format!("BUFFERS={buffers}"), format!("ROWS={rows}"));
    let flags = ["--user", "70:70", "--env", &buffers, "--env", &rows];
    world.start_of(&world.a, Image::Postgres, ID, &flags, &["sh", "-c", SCRIPT])?;
    writes_beyond(&world.a, 0).map(drop)
}

fn bytes(report: &Value, name: &str) -> Result<u64> {
    report["memory"][name].as_u64().with_context(|| format!("{name} in {report:#}"))
}

/// Moves it, and answers the report.
fn moved(from: &Site, to: &Site) -> Result<Value> {
    let before = connections(from, ID)?;
    ensure!(before.len() == 2, "both ends of one connection: {before:?}");
    let report = from.migrate_whatever_it_takes(ID)?;
    ensure!(report["memory"]["fallback"] == "", "{report:#}");
    ensure!(connections(to, ID)? == before, "{:?} is not {before:?}", connections(to, ID)?);
    nothing_is_lost(to)?;
    Ok(report)
}

#[test]
fn postgresql_goes_and_comes_back_without_losing_a_row() -> Result<()> {
    with_agents(|world| {
        let World { a, b, .. } = world;
        start(world, "128MB", 8000)?;
        nothing_is_lost(a)?;
        for (from, to) in [(a, b), (b, a)] {
            let report = moved(from, to)?;
            // The rows are in its buffers; a SysV segment of some bytes, which
            // it takes for a lock, is CRIU's.
            ensure!(bytes(&report, "given_bytes")? > 8 << 20, "{report:#}");
            let filled = bytes(&report, "shared_bytes")? - bytes(&report, "given_bytes")?;
            ensure!(filled <= 4096, "{report:#}");
        }
        world.remove(a, ID)
    })
}

/// As above, with a gigabyte of buffers, half of them in use; tells the pauses.
#[test]
#[ignore = "takes minutes"]
fn a_large_postgresql_goes_and_comes_back() -> Result<()> {
    with_agents(|world| {
        start(world, "1GB", 500_000)?;
        let mut sites = [&world.a, &world.b];
        for _ in 0..4 {
            let report = moved(sites[0], sites[1])?;
            let mib = |name| bytes(&report, name).map(|bytes| bytes >> 20);
            println!(
                "{} us, shared {} MiB, given {} MiB, {}",
                report["downtime_us"],
                mib("shared_bytes")?,
                mib("given_bytes")?,
                report["memory"]["pause"]
            );
            sites.reverse();
        }
        world.remove(sites[0], ID)
    })
}
