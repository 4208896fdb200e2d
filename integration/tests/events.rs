//! What containerd's subscribers learn, and in which order.

use containerd_client::types::v1::Status;
use nix::sys::signal::Signal;
use transship_integration::{eventually, promise, stdio::Stdio};

promise! {
    /// create < start < exit < delete, with the exec's own in between.
    fn events_come_in_the_order_of_life(world) {
        let events = world.api.events()?;
        world.container("one", &[], &["sleep", "1000"])?;
        let null = Stdio::null().streams;
        let pid = world.api.create("one", &null, None)?;
        world.api.start("one", "")?;
        world.api.exec("one", "extra", &["sh", "-c", "exit 3"], &null)?;
        let extra = world.api.start("one", "extra")?;
        world.api.wait("one", "extra")?;
        world.api.delete_exec("one", "extra")?;
        world.api.pause("one")?;
        world.api.resume("one")?;
        world.api.kill("one", "", Signal::SIGKILL)?;
        world.api.wait("one", "")?;
        world.api.delete("one")?;
        events.await_one("one", "delete")?;
        let expected = [
            "create", "start", "exec-added:extra", "exec-started:extra", "exit:extra", "paused", "resumed", "exit",
            "delete",
        ];
        assert_eq!(events.names("one"), expected);
        let all = events.of("one");
        let find = |what: &str, process: &str| {
            all.iter().find(|event| event.what == what && event.process == process).cloned().unwrap_or_else(|| {
                panic!("{what} of {process} in {all:?}")
            })
        };
        assert_eq!(find("create", "").pid, pid);
        assert_eq!(find("start", "").pid, pid);
        assert_eq!(find("exec-started", "extra").pid, extra);
        let exit = find("exit", "extra");
        assert_eq!((exit.pid, exit.status), (extra, 3));
        let exit = find("exit", "one");
        assert_eq!((exit.pid, exit.status), (pid, 137));
        world.forget("one")?;
        world.finish()
    }
}

promise! {
    /// The start of a process that ends at once is told before its exit.
    fn a_short_life_keeps_the_order(world) {
        let events = world.api.events()?;
        for number in 0..5 {
            let id = format!("one-{number}");
            world.container(&id, &[], &["true"])?;
            world.api.create(&id, &Stdio::null().streams, None)?;
            world.api.start(&id, "")?;
            assert_eq!(world.api.wait(&id, "")?.status, 0);
            world.api.delete(&id)?;
            events.await_one(&id, "delete")?;
            assert_eq!(events.names(&id), ["create", "start", "exit", "delete"]);
            world.forget(&id)?;
        }
        world.run_idle("two")?;
        for number in 0..5 {
            let exec = format!("extra-{number}");
            world.api.exec_to_end("two", &exec, &["true"], &Stdio::null())?;
            let (started, exit) = (format!("exec-started:{exec}"), format!("exit:{exec}"));
            eventually("the exit", || Ok(events.names("two").contains(&exit)))?;
            let names = events.names("two");
            let at = |name: &String| names.iter().position(|one| one == name);
            assert!(at(&started) < at(&exit), "{names:?}");
        }
        world.remove("two")?;
        world.finish()
    }
}

promise! {
    /// Out of memory: told as an event, before or after the exit, once the
    /// kernel has killed.
    fn running_out_of_memory_is_told(world) {
        let events = world.api.events()?;
        let limit = (24u64 << 20).to_string();
        // Nobody but the one to be killed asks for memory.
        let script = "(echo 1000 > /proc/self/oom_score_adj; exec tail -c 900000000 /dev/zero); \
                      sleep 1000";
        world.container("one", &["--memory-limit", &limit], &["sh", "-c", script])?;
        world.api.create("one", &Stdio::null().streams, None)?;
        world.api.start("one", "")?;
        events.await_one("one", "oom")?;
        assert_eq!(world.api.status("one", "")?, Status::Running, "process 1 was not the one killed");
        world.remove("one")?;
        world.finish()
    }
}
