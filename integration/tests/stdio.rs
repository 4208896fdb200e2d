//! Where a process's input comes from and its output goes.

use std::{fs, os::unix::fs::PermissionsExt};

use containerd_client::types::v1::Status;
use nix::sys::signal::Signal;
use transship_integration::{
    eventually, promise,
    stdio::{Stdio, Streams},
};

promise! {
    fn input_is_passed_on_until_it_is_closed(world) {
        let io = Stdio::with_input(&world.node)?;
        world.run("one", &[], &["cat"], &io)?;
        io.send("first\n")?;
        io.stdout.await_text("first\n")?;
        io.send("second\n")?;
        io.stdout.await_text("second\n")?;
        io.hang_up();
        world.api.close_stdin("one", "")?;
        assert_eq!(world.api.wait("one", "")?.status, 0, "cat ends at the end of its input");
        assert_eq!(io.stdout.await_end()?, "first\nsecond\n");
        world.remove("one")?;
        world.finish()
    }
}

promise! {
    fn an_added_process_has_its_own_streams(world) {
        let io = Stdio::output(&world.node)?;
        world.run("one", &[], &["sh", "-c", "echo first; exec sleep 1000"], &io)?;
        io.stdout.await_text("first")?;
        let extra = Stdio::with_input(&world.node)?;
        world.api.exec("one", "extra", &["sh", "-c", "cat; echo err >&2"], &extra.streams)?;
        world.api.start("one", "extra")?;
        extra.send("hello\n")?;
        extra.stdout.await_text("hello")?;
        extra.hang_up();
        world.api.close_stdin("one", "extra")?;
        assert_eq!(world.api.wait("one", "extra")?.status, 0);
        assert_eq!(extra.stdout.await_end()?, "hello\n");
        assert_eq!(extra.stderr.await_end()?, "err\n");
        world.api.delete_exec("one", "extra")?;
        assert_eq!(io.stdout.text(), "first\n");
        world.remove("one")?;
        world.finish()
    }
}

promise! {
    /// Nothing of a long output is lost, also at the moment of the exit.
    fn all_output_arrives(world) {
        const BYTES: usize = 8 << 20;
        let io = Stdio::output(&world.node)?;
        let script = format!("yes 0123456789abcde | head -c {BYTES}");
        world.run("one", &[], &["sh", "-c", &script], &io)?;
        assert_eq!(world.api.wait("one", "")?.status, 0);
        let output = io.stdout.await_end()?;
        assert_eq!(output.len(), BYTES);
        assert!(output.as_bytes().chunks(16).all(|line| line == b"0123456789abcde\n"));
        world.remove("one")?;
        world.finish()
    }
}

promise! {
    /// A container without streams runs all the same.
    fn no_streams_at_all_are_fine(world) {
        world.run("one", &[], &["sh", "-c", "echo nobody reads this; read line || exit 5"], &Stdio::null())?;
        assert_eq!(world.api.wait("one", "")?.status, 5, "the input is empty");
        world.remove("one")?;
        world.finish()
    }
}

promise! {
    fn output_can_go_to_a_file(world) {
        let log = world.node.dir().join("logs/one.log");
        world.container("one", &[], &["sh", "-c", "echo out; echo err >&2"])?;
        world.api.create("one", &Streams::to_uri(&format!("file://{}", log.display())), None)?;
        world.api.start("one", "")?;
        world.api.wait("one", "")?;
        let complete = || {
            let text = fs::read_to_string(&log).unwrap_or_default();
            Ok(text.contains("out\n") && text.contains("err\n"))
        };
        eventually("both lines in the file", complete)?;
        world.remove("one")?;
        world.finish()
    }
}

promise! {
    /// A logging program gets both streams, the container's names, and the
    /// arguments of its URI; the container starts when it says it is ready.
    fn output_can_go_to_a_program(world) {
        let (program, log) = (world.node.dir().join("logger"), world.node.dir().join("logger.out"));
        let script = "#!/bin/sh\n\
            trap '' TERM\n\
            echo \"$CONTAINER_NAMESPACE $CONTAINER_ID $*\" >\"$2\"\n\
            # 3 and 4 are the streams; 5 is closed to say ready.\n\
            exec 5>&-\n\
            cat <&3 >>\"$2\" &\n\
            cat <&4 >>\"$2\" &\n\
            exec 3<&- 4<&-\n\
            wait\n\
            echo end >>\"$2\"\n";
        fs::write(&program, script)?;
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
        let uri = format!("binary://{}?to={}", program.display(), log.display());
        world.container("one", &[], &["sh", "-c", "echo out; echo err >&2"])?;
        world.api.create("one", &Streams::to_uri(&uri), None)?;
        let logged = || fs::read_to_string(&log).unwrap_or_default();
        assert_eq!(logged(), format!("default one to {}\n", log.display()), "it was ready before Create answered");
        world.api.start("one", "")?;
        world.api.wait("one", "")?;
        eventually("both lines in the log", || Ok(logged().contains("\nout\n") && logged().contains("\nerr\n")))?;
        world.remove("one")?;
        eventually("the logger to end", || Ok(logged().ends_with("end\n")))?;
        world.finish()
    }
}

promise! {
    fn a_terminal_has_a_size_and_both_directions(world) {
        let io = Stdio::terminal(&world.node)?;
        world.run("one", &["--tty"], &["sh"], &io)?;
        world.api.resize("one", "", 123, 45)?;
        io.send("tty; stty size\n")?;
        io.stdout.await_text("45 123")?;
        io.stdout.await_text("/dev/pts/")?;
        world.api.resize("one", "", 80, 24)?;
        io.send("stty size\n")?;
        io.stdout.await_text("24 80")?;
        io.send("exit 6\n")?;
        assert_eq!(world.api.wait("one", "")?.status, 6);
        io.stdout.await_end()?;
        world.remove("one")?;
        world.finish()
    }
}

promise! {
    fn an_added_process_can_have_a_terminal(world) {
        world.run_idle("one")?;
        let io = Stdio::terminal(&world.node)?;
        world.api.exec("one", "extra", &["sh"], &io.streams)?;
        world.api.start("one", "extra")?;
        world.api.resize("one", "extra", 99, 33)?;
        io.send("stty size; exit 4\n")?;
        io.stdout.await_text("33 99")?;
        assert_eq!(world.api.wait("one", "extra")?.status, 4);
        world.api.delete_exec("one", "extra")?;
        world.remove("one")?;
        world.finish()
    }
}

promise! {
    /// A child that keeps the output open does not keep the exit from being
    /// told, nor the task from being deleted.
    fn an_open_output_does_not_hold_up_the_end(world) {
        let io = Stdio::output(&world.node)?;
        world.run_idle("one")?;
        world.api.exec("one", "extra", &["sh", "-c", "sleep 1000 & echo started"], &io.streams)?;
        world.api.start("one", "extra")?;
        assert_eq!(world.api.wait("one", "extra")?.status, 0);
        io.stdout.await_text("started")?;
        assert_eq!(world.api.status("one", "")?, Status::Running);
        world.api.kill("one", "", Signal::SIGKILL)?;
        world.await_status("one", Status::Stopped)?;
        world.remove("one")?;
        world.finish()
    }
}
