//! The fault server with real processes and real userfaultfds; only CRIU's
//! part of the conversation is ours.
#![cfg(target_os = "linux")]

mod sys;
mod target;

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::SeqCst},
        mpsc,
    },
    time::{Duration, Instant},
};

use tempfile::TempDir;
use transship_memory::{FaultOptions, FaultServer, MemoryError, Serving, Store};
use transship_types::{PAGE, PageRange, PageSet, Space};

use target::{Criu, Target, content};

/// Where nothing is mapped in a fresh program.
const BASE: u64 = 0x10_0000_0000;
const ELSEWHERE: u64 = 0x20_0000_0000;

fn pages(start: u64, count: u64) -> PageRange {
    PageRange::of_pages(start, count).unwrap()
}

fn bytes(vpid: u32, range: PageRange) -> Vec<u8> {
    let homes = (range.start()..range.end()).step_by(PAGE as usize);
    homes.flat_map(|home| content(vpid, home).to_ne_bytes().repeat(PAGE as usize / 8)).collect()
}

/// A server, and the pages that its tasks wait for.
struct World {
    dir: TempDir,
    store: Arc<Store>,
    lazy: HashMap<u32, PageSet>,
}

impl World {
    fn new() -> Self {
        let store = Arc::new(Store::new(1 << 30));
        Self { dir: tempfile::tempdir().unwrap(), store, lazy: HashMap::new() }
    }

    /// A task with memory of this many pages at `BASE`, all in the store.
    fn task(&mut self, vpid: u32, count: u64) -> Target {
        let mut target = Target::start(vpid);
        target.ask(&format!("map {BASE} {count}"));
        let mut range = Some(pages(BASE, count));
        while let Some(rest) = range {
            let (batch, after) = rest.split(256);
            self.store.put(Space::Process(vpid), &[batch], &bytes(vpid, batch), 0).unwrap();
            range = after;
        }
        self.lazy.insert(vpid, [pages(BASE, count)].into_iter().collect());
        target
    }

    fn serve(&self, options: FaultOptions, targets: &mut [&mut Target]) -> Serving {
        let (serving, mut criu) = self.begin(options);
        targets.iter_mut().for_each(|target| criu.task(target));
        criu.zombie(4000);
        criu.finish();
        serving.resumed();
        serving
    }

    fn begin(&self, options: FaultOptions) -> (Serving, Criu) {
        let server = FaultServer::listen(self.dir.path()).unwrap();
        let serving = server.serve(Arc::clone(&self.store), self.lazy.clone(), options).unwrap();
        (serving, Criu::connect(self.dir.path()))
    }
}

fn never() -> FaultOptions {
    FaultOptions::new(|| panic!("it had to give up"))
}

/// So slow that what is asked for is asked as a fault.
fn slowly() -> FaultOptions {
    FaultOptions { fill_limit: Some(16 << 20), ..never() }
}

/// Whoever connects could give itself out for CRIU, and a page for a fault.
#[test]
fn its_socket_is_its_owners_alone() {
    use std::os::unix::fs::{FileTypeExt, PermissionsExt};
    let dir = tempfile::tempdir().unwrap();
    let _server = FaultServer::listen(dir.path()).unwrap();
    let socket = std::fs::metadata(dir.path().join("lazy-pages.socket")).unwrap();
    assert!(socket.file_type().is_socket());
    assert_eq!(socket.permissions().mode() & 0o777, 0o600);
}

#[test]
fn all_tasks_get_what_is_theirs() {
    const COUNT: u64 = 3000;
    let mut world = World::new();
    let (mut one, mut two) = (world.task(1, COUNT), world.task(2, COUNT / 2));
    // Hot pages, and known zeroes.
    world.store.put(Space::Process(1), &[pages(BASE, 9)], &bytes(1, pages(BASE, 9)), 4).unwrap();
    world.store.zero(Space::Process(1), &[pages(BASE + 20 * PAGE, 2)], 2).unwrap();
    let before = world.store.bytes();
    let serving = world.serve(slowly(), &mut [&mut one, &mut two]);
    assert_eq!(two.bad("threads", BASE, COUNT / 2, BASE), 0);
    let served = serving.wait().unwrap();
    assert_eq!(one.bad("check", BASE, 20, BASE), 0);
    assert_eq!(one.ask(&format!("zero {} 2", BASE + 20 * PAGE)), 0);
    let rest = BASE + 22 * PAGE;
    assert_eq!(one.bad("check", rest, COUNT - 22, rest), 0);
    assert_eq!((one.watched(), two.watched()), (0, 0));
    assert!(served.faults > 0 && served.pages >= COUNT + COUNT / 2 - 2, "{served:?}");
    assert_eq!(served.fault_latency.iter().sum::<u64>(), served.faults);
    assert!(before > 0 && world.store.bytes() == 0);
}

#[test]
fn faults_come_before_the_fill_and_before_the_end_of_the_restore() {
    let mut world = World::new();
    let mut task = world.task(1, 600);
    let (serving, mut criu) = world.begin(never());
    criu.task(&mut task);
    assert_eq!(task.bad("threads", BASE, 300, BASE), 0);
    assert!(task.watched() > 0);
    criu.finish();
    serving.resumed();
    assert!(serving.wait().unwrap().faults > 0);
    assert_eq!(task.bad("check", BASE, 600, BASE), 0);
}

#[test]
fn a_page_that_was_never_there_is_zero() {
    let mut world = World::new();
    let mut task = world.task(1, 4096);
    let bare = [pages(BASE + 64 * PAGE, 64)].into_iter().collect();
    world.lazy.get_mut(&1).unwrap().subtract(&bare);
    world.store.forget(Space::Process(1), pages(BASE + 64 * PAGE, 64)).unwrap();
    let serving = world.serve(slowly(), &mut [&mut task]);
    assert_eq!(task.ask(&format!("zero {} 64", BASE + 64 * PAGE)), 0);
    assert_eq!(task.bad("check", BASE + 128 * PAGE, 500, BASE + 128 * PAGE), 0);
    serving.wait().unwrap();
}

#[test]
fn forks_get_what_their_parent_waits_for() {
    const COUNT: u64 = 4096;
    let mut world = World::new();
    let mut task = world.task(1, COUNT);
    let serving = world.serve(slowly(), &mut [&mut task]);
    for _ in 0..10 {
        assert_eq!(task.bad("fork", BASE, COUNT, BASE), 0);
    }
    assert_eq!(task.bad("threads", BASE, COUNT, BASE), 0);
    serving.wait().unwrap();
    assert_eq!(task.bad("fork", BASE, COUNT, BASE), 0);
    assert_eq!((task.watched(), world.store.bytes()), (0, 0));
}

#[test]
fn memory_that_moves_or_goes_is_followed() {
    const COUNT: u64 = 4096;
    let mut world = World::new();
    let mut task = world.task(1, COUNT);
    let serving = world.serve(slowly(), &mut [&mut task]);
    let at = |page: u64| BASE + page * PAGE;
    // Twice, the second time over a part of what is waited for.
    task.ask(&format!("move {} 512 {ELSEWHERE}", at(3000)));
    task.ask(&format!("move {ELSEWHERE} 512 {}", at(2000)));
    assert_eq!(task.bad("threads", at(2000), 512, at(3000)), 0);
    task.ask(&format!("unmap {} 200", at(1000)));
    task.ask(&format!("dontneed {} 200", at(3600)));
    assert_eq!(task.ask(&format!("zero {} 200", at(3600))), 0);
    task.ask(&format!("move {} 100 {ELSEWHERE}", at(2600)));
    assert_eq!(task.bad("fork", ELSEWHERE, 100, at(2600)), 0);
    serving.wait().unwrap();
    assert_eq!(task.bad("check", BASE, 1000, BASE), 0);
    assert_eq!(task.bad("check", at(1200), 800, at(1200)), 0);
    assert_eq!(task.bad("check", ELSEWHERE, 100, at(2600)), 0);
    assert_eq!(task.ask(&format!("zero {} 200", at(3600))), 0);
    assert_eq!((task.watched(), world.store.bytes()), (0, 0));
}

#[test]
fn a_task_that_dies_holds_nobody_up() {
    let mut world = World::new();
    let (mut one, mut two) = (world.task(1, 4096), world.task(2, 512));
    let serving = world.serve(slowly(), &mut [&mut one, &mut two]);
    one.kill();
    serving.wait().unwrap();
    assert_eq!(two.bad("check", BASE, 512, BASE), 0);
    assert_eq!(world.store.bytes(), 0);
}

#[test]
fn a_restore_that_ends_early_is_an_error() {
    let mut world = World::new();
    let mut task = world.task(1, 8);
    let (serving, mut criu) = world.begin(never());
    criu.task(&mut task);
    drop(criu);
    assert!(serving.wait().is_err());
    task.kill();
    serving.give_up();
}

#[test]
fn what_waits_for_a_restore_that_never_comes_can_be_told_to_stop() {
    let world = World::new();
    let (serving, criu) = world.begin(never());
    serving.give_up();
    assert!(serving.wait().is_err());
    drop(criu);
}

/// The page is told to be lazy and is not in the store.
#[test]
fn the_tree_is_killed_before_it_could_read_zero() {
    let mut world = World::new();
    let mut task = world.task(1, 64);
    world.store.forget(Space::Process(1), pages(BASE + 8 * PAGE, 1)).unwrap();
    let pid = nix::unistd::Pid::from_raw(task.pid() as i32);
    let watched = Arc::new(AtomicU64::new(0));
    let seen = Arc::clone(&watched);
    let options = FaultOptions::new(move || {
        let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
        seen.fetch_add(smaps.contains(" um ").into(), SeqCst);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
    });
    let (serving, mut criu) = world.begin(options);
    criu.task(&mut task);
    serving.resumed();
    criu.finish();
    let error = serving.wait().unwrap_err();
    assert!(matches!(error, MemoryError::Missing { .. }), "{error}");
    serving.give_up();
    assert_eq!(watched.load(SeqCst), 1, "killed once, while its memory was still ours");
    task.kill();
}

#[test]
fn a_server_that_is_dropped_kills_the_tree() {
    let mut world = World::new();
    let mut task = world.task(1, 4096);
    let (tell, killed) = mpsc::channel();
    let pid = nix::unistd::Pid::from_raw(task.pid() as i32);
    let kill = move || {
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
        tell.send(()).unwrap();
    };
    let options = FaultOptions { fill_limit: Some(4096), ..FaultOptions::new(kill) };
    drop(world.serve(options, &mut [&mut task]));
    killed.recv_timeout(Duration::from_secs(20)).unwrap();
    task.kill();
    assert!(!task.is_alive());
}

#[test]
fn memory_goes_back_while_pages_are_placed() {
    let mut world = World::new();
    let mut task = world.task(1, 8192);
    let before = world.store.bytes();
    let options = FaultOptions { fill_limit: Some(32 << 20), ..never() };
    let serving = world.serve(options, &mut [&mut task]);
    let mut seen = Vec::new();
    while task.watched() > 0 {
        seen.push(world.store.bytes());
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(seen.iter().any(|bytes| (1..before / 2).contains(bytes)), "{seen:?} of {before}");
    serving.wait().unwrap();
}

/// Not a promise, only what this machine does.
#[test]
#[ignore = "a measurement"]
fn how_fast() {
    const COUNT: u64 = 128 << 10;
    let mut world = World::new();
    let batch = bytes(1, pages(BASE, 256));
    let other = Store::new(1 << 30);
    let start = Instant::now();
    for first in (0..COUNT).step_by(256) {
        other.put(Space::Process(9), &[pages(BASE + first * PAGE, 256)], &batch, 0).unwrap();
    }
    println!("put: {:.2} GB/s", rate(COUNT, start.elapsed()));
    drop(other);
    let mut task = world.task(1, COUNT);
    let served = world.serve(never(), &mut [&mut task]).wait().unwrap();
    println!("fill: {:.2} GB/s, {served:?}", rate(served.pages, served.duration));
    let mut world = World::new();
    let mut task = world.task(1, COUNT);
    let options = FaultOptions { fill_limit: Some(64 << 20), ..never() };
    let serving = world.serve(options, &mut [&mut task]);
    assert_eq!(task.bad("threads", BASE, COUNT, BASE), 0);
    println!("six threads everywhere: {:?}", serving.wait().unwrap());
}

fn rate(pages: u64, time: Duration) -> f64 {
    (pages * PAGE) as f64 / time.as_secs_f64() / 1e9
}

/// Post-copy: pages come when they are asked for, and the rest later.
#[test]
fn pages_that_are_still_to_come_are_waited_for() {
    const COUNT: u64 = 400;
    let mut world = World::new();
    let mut task = world.task(1, COUNT);
    let space = Space::Process(1);
    let late = pages(BASE + 100 * PAGE, 200);
    world.store.forget(space, late).unwrap();
    assert_eq!(world.store.expect(space, &world.lazy[&1]).unwrap(), 200);
    let store = Arc::clone(&world.store);
    let options = FaultOptions {
        source: Some(Arc::new(move |space, address| {
            let page = pages(address, 1);
            store.put(space, &[page], &bytes(1, page), 0).unwrap();
        })),
        ..never()
    };
    let serving = world.serve(options, &mut [&mut task]);
    assert_eq!(task.bad("threads", BASE, 200, BASE), 0);
    assert_eq!(world.store.missing(space), [pages(BASE + 200 * PAGE, 100)].into_iter().collect());
    assert!(task.watched() > 0);
    world.store.put(space, &[late], &bytes(1, late), 0).unwrap();
    serving.wait().unwrap();
    assert_eq!(task.bad("check", BASE, COUNT, BASE), 0);
    assert_eq!((task.watched(), world.store.bytes()), (0, 0));
}
