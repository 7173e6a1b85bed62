//! Standard streams.

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::agent::{context, read_all, within};
use crate::agent_test;

agent_test! {
    async fn input_reaches_the_process_and_ends(agent: Agent) {
        let mut streams = agent.run("a", &agent.spec(&["/bin/cat"])).await;
        streams.write("hello\n").await;
        streams.stdin.shutdown().await.unwrap();
        assert_eq!(read_all(streams.stdout).await, "hello\n");
        assert_eq!(agent.wait("a", "").await.exit_code, 0);
        agent.delete("a").await;
    }
}

agent_test! {
    async fn many_bytes_arrive_unharmed(agent: Agent) {
        const BYTES: usize = 32 << 20;
        let mut streams = agent.run("a", &agent.spec(&["/bin/cat"])).await;
        let sent: Vec<u8> = (0..BYTES).map(|at| (at * 31 % 251) as u8).collect();
        let copy = sent.clone();
        let mut stdin = streams.stdin;
        let writer = tokio::spawn(async move {
            stdin.write_all(&copy).await.unwrap();
            stdin.shutdown().await.unwrap();
        });
        let mut received = Vec::with_capacity(BYTES);
        within("all bytes", streams.stdout.read_to_end(&mut received)).await.unwrap();
        writer.await.unwrap();
        assert!(received == sent, "{} of {BYTES} bytes", received.len());
        assert_eq!(agent.wait("a", "").await.exit_code, 0);
        agent.delete("a").await;
    }
}

agent_test! {
    async fn a_slow_reader_slows_the_writer_and_loses_nothing(agent: Agent) {
        let line = "i=0; while [ $i -lt 40000 ]; do echo $i 0123456789012345678901234567890123456789; i=$((i+1)); done; echo end >&2";
        let mut streams = agent.run("a", &agent.spec(&["/bin/sh", "-c", line])).await;
        tokio::time::sleep(std::time::Duration::from_millis(500)).await;
        // It can't have ended: far less fits into all buffers on the way.
        let stderr = streams.stderr.take().unwrap();
        let mut byte = [0];
        assert_eq!(stderr.try_read(&mut byte).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
        let text = read_all(streams.stdout).await;
        assert_eq!(text.lines().count(), 40_000);
        assert!(text.ends_with("39999 0123456789012345678901234567890123456789\n"));
        assert_eq!(read_all(stderr).await, "end\n");
        agent.wait("a", "").await;
        agent.delete("a").await;
    }
}

agent_test! {
    async fn output_of_a_quick_process_is_complete(agent: Agent) {
        for _ in 0..10 {
            let spec = agent.spec(&["/bin/sh", "-c", "head -c 100000 /dev/zero"]);
            let (code, stdout, _) = agent.output(&spec).await;
            assert_eq!((code, stdout.len()), (0, 100_000));
        }
    }
}

agent_test! {
    async fn a_process_that_reads_no_input_still_ends(agent: Agent) {
        let mut streams = agent.run("a", &agent.spec(&["/bin/sleep", "0.3"])).await;
        let big = vec![b'x'; 4 << 20];
        // More than fits: fails when the process is gone instead of hanging.
        let write = within("the input to be given up", streams.stdin.write_all(&big)).await;
        assert!(write.is_err());
        assert_eq!(agent.wait("a", "").await.exit_code, 0);
        agent.delete("a").await;
    }
}

agent_test! {
    async fn the_streams_can_be_opened_by_name(agent: Agent) {
        let mut spec = agent.spec(&["/bin/sh", "-c", "echo out > /dev/stdout; echo err > /dev/stderr"]);
        spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
        assert_eq!(agent.output(&spec).await, (0, "out\n".to_owned(), "err\n".to_owned()));
    }
}

agent_test! {
    async fn a_terminal_is_a_terminal(agent: Agent) {
        let line = "tty; stty size; read line; echo got $line; ls -l /dev/console | cut -c1; stty size";
        let mut spec = agent.spec(&["/bin/sh", "-c", line]);
        spec["process"]["terminal"] = json!(true);
        spec["process"]["consoleSize"] = json!({"height": 40, "width": 100});
        let mut streams = agent.run("a", &spec).await;
        let seen = streams.read_until("40 100").await;
        assert!(seen.contains("/dev/pts/0"), "{seen:?}");
        let resize = husk_protocol::agent::ResizePtyRequest {
            container_id: "a".to_owned(),
            width: 80,
            height: 25,
            ..Default::default()
        };
        agent.client.resize_pty(context(), &resize).await.unwrap();
        streams.write("word\n").await;
        let rest = read_all(streams.stdout).await;
        assert!(rest.contains("got word\r\nc\r\n25 80\r\n"), "{rest:?}");
        assert_eq!(agent.wait("a", "").await.exit_code, 0);
        agent.delete("a").await;
    }
}

agent_test! {
    async fn an_exec_has_a_terminal_of_its_own(agent: Agent) {
        let mut first = agent.run("a", &agent.spec(&["/bin/sh", "-c", "echo ready; exec sleep 1000"])).await;
        first.read_until("ready").await;
        let process = json!({"terminal": true, "user": {"uid": 1000, "gid": 1000}, "args": ["sh", "-c", "tty; read x; exit 4"], "env": ["PATH=/bin"], "cwd": "/"});
        let mut streams = agent.exec("a", "e", &process).await.unwrap();
        streams.read_until("/dev/pts/0").await;
        // Ctrl-C reaches the foreground process as a signal.
        streams.write("\u{3}").await;
        assert_eq!(agent.wait("a", "e").await.exit_code, 130);
        agent.delete("a").await;
    }
}
