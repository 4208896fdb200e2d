//! The life of a task and of the processes added to it, call by call, as
//! containerd sees it.

use containerd_client::types::v1::Status;
use nix::sys::signal::Signal;
use tonic::Code;
use transship_integration::{eventually, promise, refusal, stdio::Stdio};

promise! {
    /// Create, Start, State, Wait and Delete agree on pid and exit.
    fn an_exit_status_is_told_everywhere(world) {
        let io = Stdio::output(&world.node)?;
        world.container("one", &[], &["sh", "-c", "echo out; echo err >&2; exit 7"])?;
        let pid = world.api.create("one", &io.streams, None)?;
        assert!(pid > 0, "a created container has a process");
        let created = world.api.get("one", "")?;
        assert_eq!((created.status(), created.pid), (Status::Created, pid));
        assert_eq!(io.stdout.text(), "", "nothing has run yet");

        assert_eq!(world.api.start("one", "")?, pid);
        let waited = world.api.wait("one", "")?;
        assert_eq!(waited.status, 7);
        assert!(waited.at > 0, "the time of the exit is told");
        assert_eq!((io.stdout.await_end()?, io.stderr.await_end()?), ("out\n".into(), "err\n".into()));
        let stopped = world.api.get("one", "")?;
        assert_eq!((stopped.status(), stopped.exit_status, stopped.pid), (Status::Stopped, 7, pid));
        assert_eq!(stopped.stdout, io.streams.stdout);

        assert_eq!(world.api.delete("one")?, waited);
        assert_eq!(refusal(world.api.get("one", ""))?, Code::NotFound);
        world.forget("one")?;
        world.finish()
    }
}

promise! {
    /// A task may be deleted before it was started.
    fn a_created_task_can_be_deleted(world) {
        world.container("one", &[], &["sleep", "1000"])?;
        world.api.create("one", &Stdio::null().streams, None)?;
        world.api.kill("one", "", Signal::SIGKILL)?;
        world.await_status("one", Status::Stopped)?;
        assert_eq!(world.api.delete("one")?.status, 137);
        world.forget("one")?;
        world.finish()
    }
}

promise! {
    fn a_signal_reaches_the_process(world) {
        let io = Stdio::output(&world.node)?;
        let script = "trap 'echo caught; exit 9' TERM; echo ready; while :; do sleep 0.1; done";
        world.run("one", &[], &["sh", "-c", script], &io)?;
        io.stdout.await_text("ready")?;
        world.api.kill("one", "", Signal::SIGTERM)?;
        assert_eq!(world.api.wait("one", "")?.status, 9);
        io.stdout.await_text("caught")?;
        world.remove("one")?;
        world.finish()
    }
}

promise! {
    fn every_waiter_is_answered(world) {
        world.run_idle("one")?;
        let exits = world.api.wait_many("one", 5, || Ok(world.api.kill("one", "", Signal::SIGKILL)?))?;
        assert_eq!(exits.len(), 5);
        assert!(exits.iter().all(|exit| exit.status == 137 && *exit == exits[0]), "{exits:?}");
        assert_eq!(world.api.wait("one", "")?, exits[0], "a late one as well");
        world.remove("one")?;
        world.finish()
    }
}

promise! {
    fn processes_can_be_added(world) {
        world.run_idle("one")?;
        let io = Stdio::output(&world.node)?;
        world.api.exec("one", "extra", &["sh", "-c", "echo $$; cat /proc/1/cmdline; exit 3"], &io.streams)?;
        assert_eq!(world.api.status("one", "extra")?, Status::Created);
        let pid = world.api.start("one", "extra")?;
        assert!(pid > 0);
        assert_eq!(world.api.wait("one", "extra")?.status, 3);
        assert!(io.stdout.await_end()?.contains("sleep"), "it sees the container's processes");
        let gone = world.api.get("one", "extra")?;
        assert_eq!((gone.status(), gone.exit_status, gone.pid), (Status::Stopped, 3, pid));
        assert_eq!(world.api.status("one", "")?, Status::Running, "the first process goes on");
        let deleted = world.api.delete_exec("one", "extra")?;
        assert_eq!(deleted.status, 3);
        assert!(deleted.at > 0);
        assert_eq!(refusal(world.api.get("one", "extra"))?, Code::NotFound);

        // The same name again, and this time it is killed.
        world.api.exec("one", "extra", &["sleep", "1000"], &Stdio::null().streams)?;
        world.api.start("one", "extra")?;
        world.api.kill("one", "extra", Signal::SIGKILL)?;
        assert_eq!(world.api.wait("one", "extra")?.status, 137);
        world.api.delete_exec("one", "extra")?;
        world.remove("one")?;
        world.finish()
    }
}

promise! {
    /// Execs that end at the same time each get their own exit status.
    fn many_processes_at_once_keep_their_statuses(world) {
        world.run_idle("one")?;
        let names: Vec<_> = (0..8).map(|number| (format!("extra-{number}"), number)).collect();
        for (name, number) in &names {
            let script = format!("exit {number}");
            world.api.exec("one", name, &["sh", "-c", &script], &Stdio::null().streams)?;
        }
        for (name, _) in &names {
            world.api.start("one", name)?;
        }
        for (name, number) in &names {
            assert_eq!(world.api.wait("one", name)?.status, *number, "{name}");
            world.api.delete_exec("one", name)?;
        }
        world.remove("one")?;
        world.finish()
    }
}

promise! {
    /// A program that is not there: a clear error, and the container lives.
    fn a_missing_program_is_an_error(world) {
        world.run_idle("one")?;
        world.api.exec("one", "extra", &["/no/such/program"], &Stdio::null().streams)?;
        let error = world.api.start("one", "extra").expect_err("there is no such program");
        assert!(error.message().contains("/no/such/program"), "{error:?}");
        let _ = world.api.delete_exec("one", "extra");
        assert_eq!(world.api.status("one", "")?, Status::Running);
        world.remove("one")?;

        world.container("two", &[], &["/no/such/program"])?;
        let create = || world.api.create("two", &Stdio::null().streams, None);
        let mut error = create().expect_err("nor here");
        // runc's init may be gone before runc has read why.
        while error.message().contains("connection reset by peer") {
            error = create().expect_err("nor here");
        }
        assert!(error.message().contains("/no/such/program"), "{error:?}");
        world.forget("two")?;
        world.finish()
    }
}

promise! {
    /// `kill --all` reaches children and added processes alike.
    fn kill_all_reaches_every_process(world) {
        let io = Stdio::output(&world.node)?;
        // Process 1 ignores TERM: the others must get it by themselves.
        let script = "trap '' TERM; (trap - TERM; exec sleep 1000) & echo ready; while :; do sleep 0.1; done";
        world.run("one", &[], &["sh", "-c", script], &io)?;
        io.stdout.await_text("ready")?;
        world.api.exec("one", "extra", &["sleep", "1000"], &Stdio::null().streams)?;
        world.api.start("one", "extra")?;
        world.api.kill_all("one", Signal::SIGTERM)?;
        assert_eq!(world.api.wait("one", "extra")?.status, 143);
        world.api.delete_exec("one", "extra")?;
        world.api.kill_all("one", Signal::SIGKILL)?;
        assert_eq!(world.api.wait("one", "")?.status, 137);
        world.remove("one")?;
        world.finish()
    }
}

promise! {
    fn pids_names_every_process(world) {
        let first = world.run_idle("one")?;
        world.api.exec("one", "extra", &["sleep", "1000"], &Stdio::null().streams)?;
        let second = world.api.start("one", "extra")?;
        let processes = world.api.pids("one")?;
        let mut pids: Vec<_> = processes.iter().map(|process| process.pid).collect();
        pids.sort_unstable();
        let mut expected = vec![first, second];
        expected.sort_unstable();
        assert_eq!(pids, expected);
        let described = processes.iter().find(|process| process.pid == second).and_then(|process| process.info.clone());
        let described = described.expect("an added process carries its exec id");
        assert!(String::from_utf8_lossy(&described.value).contains("extra"), "{described:?}");
        world.remove("one")?;
        world.finish()
    }
}

promise! {
    /// While paused nothing runs, and the state says so.
    fn a_paused_container_stands_still(world) {
        let io = Stdio::output(&world.node)?;
        let script = "n=0; while :; do n=$((n+1)); echo $n; sleep 0.02; done";
        world.run("one", &[], &["sh", "-c", script], &io)?;
        io.stdout.await_text("5\n")?;
        world.api.pause("one")?;
        assert_eq!(world.api.status("one", "")?, Status::Paused);
        let (file, frozen) =
            if world.node.is_v1("freezer") { ("freezer.state", "FROZEN") } else { ("cgroup.freeze", "1") };
        assert_eq!(world.cgroup_file("one", "freezer", file)?, frozen);
        world.api.resume("one")?;
        assert_eq!(world.api.status("one", "")?, Status::Running);
        let before = io.stdout.bytes().len();
        eventually("the container to count on", || Ok(io.stdout.bytes().len() > before + 20))?;
        world.remove("one")?;
        world.finish()
    }
}

promise! {
    /// What cannot be done is refused with containerd's own codes.
    fn impossible_calls_are_refused(world) {
        let null = Stdio::null().streams;
        assert_eq!(refusal(world.api.get("nobody", ""))?, Code::NotFound);
        world.run_idle("one")?;
        assert_eq!(refusal(world.api.create("one", &null, None))?, Code::AlreadyExists);
        assert_eq!(refusal(world.api.get("one", "nobody"))?, Code::NotFound);
        assert_eq!(refusal(world.api.start("one", "nobody"))?, Code::NotFound);
        // It runs. containerd's own shim gives this refusal no code.
        let code = refusal(world.api.delete("one"))?;
        assert!([Code::FailedPrecondition, Code::Unknown].contains(&code), "{code:?}");
        world.api.exec("one", "extra", &["sleep", "1000"], &null)?;
        assert_eq!(refusal(world.api.exec("one", "extra", &["true"], &null))?, Code::AlreadyExists);
        world.api.delete_exec("one", "extra")?;
        assert_eq!(world.api.status("one", "")?, Status::Running, "after all this");
        world.api.kill("one", "", Signal::SIGKILL)?;
        world.await_status("one", Status::Stopped)?;
        assert_eq!(refusal(world.api.kill("one", "", Signal::SIGKILL))?, Code::NotFound, "it ended");
        world.remove("one")?;
        world.finish()
    }
}

promise! {
    /// The daemon's own client, from start to end.
    fn ctr_run_works(world) {
        let runtime = world.runtime.name();
        let run = |arguments: &[&str]| {
            let mut all = vec!["run", "--rm", "--runtime", runtime];
            all.extend(arguments);
            world.node.ctr(&all)
        };
        let done = run(&[world.image, "one", "echo", "hello"])?;
        assert_eq!((done.code, done.stdout.as_str()), (0, "hello\n"), "{}", done.stderr);
        assert_eq!(run(&[world.image, "two", "sh", "-c", "exit 42"])?.code, 42);
        let greeted = run(&["--env", "GREETING=moin", world.image, "three", "sh", "-c", "echo $GREETING"])?;
        assert_eq!(greeted.stdout, "moin\n");
        world.finish()
    }
}
