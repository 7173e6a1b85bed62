//! Programs in the guest itself: who may ask for them, and what becomes of them.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use husk_node::shell::{self, Asked, Request, TerminalRequest, Told};
use serde_json::Value;

use crate::Case;
use crate::agent::FLOOD;
use crate::case::{Node, Shim, block_on};
use crate::lifecycle::{finish, kill, running};
use crate::template;

pub const CASES: &[Case] = &[
    ("shell_is_not_there_unless_allowed", off),
    ("shell_hands_on_streams_and_exit_code", streams),
    ("shell_has_a_terminal", terminal),
    ("shell_ends_with_whoever_asked", hang_up),
    ("shell_refuses_nonsense", nonsense),
    ("shell_of_a_machine_that_ends", machine_ends),
    ("shell_of_a_copy_is_as_its_pod_may", copies),
];

fn socket(node: &Node, id: &str) -> PathBuf {
    node.state_dir().join("test").join(id).join(shell::SOCKET)
}

fn off() {
    block_on(async {
        let node = Node::new().await;
        // The agent has it; the shim does not serve it all the same.
        node.configure("kernel_parameters = 'husk.debug_shell=1'\n");
        let (_, shim) = running(&node, "o", &["sleep"]).await;
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert!(!socket(&node, "o").exists());
        over(&node, &shim, "o").await;
        // Nor is anything begun without what it needs.
        node.configure("debug_shell = true\n");
        let bundle = node.bundle("p", &["sleep"]);
        let shim = node.start(&bundle).await;
        let error = shim.create(&bundle.request()).await.unwrap_err();
        assert!(error.to_string().contains("debug shell /"), "{error}");
        shim.shut_down("p").await;
        shim.assert_gone().await;
        node.assert_clean();
    });
}

/// A pod in whose guest programs may be run.
async fn allowed(node: &Node, id: &str) -> Shim {
    put_shell(node);
    node.configure("debug_shell = true\n");
    let (_, shim) = running(node, id, &["sleep"]).await;
    await_socket(node, id).await;
    shim
}

/// Puts beside the initramfs what a shell needs.
fn put_shell(node: &Node) {
    node.put_image("debug.cpio", "busybox");
}

async fn await_socket(node: &Node, id: &str) {
    let began = Instant::now();
    while !socket(node, id).exists() {
        assert!(began.elapsed() < Duration::from_secs(5), "no socket");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Ends the pod.
async fn over(node: &Node, shim: &Shim, id: &str) {
    kill(shim, id, "", 9).await.unwrap();
    shim.wait(id, "").await.unwrap();
    finish(node, shim, id).await;
}

fn connect(node: &Node, id: &str) -> UnixStream {
    let dir = File::open(socket(node, id).parent().unwrap()).unwrap();
    let stream = UnixStream::connect(shell::path_in(dir.as_raw_fd())).unwrap();
    let patience = Some(Duration::from_secs(30));
    stream.set_read_timeout(patience).unwrap();
    stream
}

fn request(words: &[&str]) -> Request {
    Request {
        args: words.iter().map(|&word| word.to_owned()).collect(),
        stdin: true,
        terminal: None,
    }
}

fn ask(node: &Node, id: &str, words: &[&str]) -> UnixStream {
    let mut stream = connect(node, id);
    stream
        .write_all(&Asked::Run(request(words)).frame())
        .unwrap();
    stream
}

/// What is told until the last of it: output, errors, and that.
async fn told(mut stream: UnixStream) -> (Vec<u8>, Vec<u8>, Option<Told>) {
    let read = tokio::task::spawn_blocking(move || {
        let (mut output, mut errors) = (Vec::new(), Vec::new());
        while let Ok(Some((kind, rest))) = shell::read(&mut stream) {
            match Told::parse(kind, rest).unwrap() {
                Told::Output(bytes) => output.extend(bytes),
                Told::Errors(bytes) => errors.extend(bytes),
                last => {
                    assert!(shell::read(&mut stream).unwrap().is_none());
                    return (output, errors, Some(last));
                }
            }
        }
        (output, errors, None)
    });
    read.await.unwrap()
}

fn streams() {
    block_on(async {
        let node = Node::new().await;
        let shim = allowed(&node, "s").await;
        let file = fs::symlink_metadata(socket(&node, "s")).unwrap();
        assert!(file.file_type().is_socket());
        assert_eq!(file.permissions().mode() & 0o777, 0o600);
        let mut stream = ask(&node, "s", &["cat"]);
        stream
            .write_all(&Asked::Input(b"hello".to_vec()).frame())
            .unwrap();
        stream.write_all(&Asked::EndOfInput.frame()).unwrap();
        let (output, _, last) = told(stream).await;
        assert_eq!((&output[..], last), (&b"hello"[..], Some(Told::Exit(0))));
        let (_, errors, last) = told(ask(&node, "s", &["complain", "no"])).await;
        assert_eq!((&errors[..], last), (&b"no"[..], Some(Told::Exit(0))));
        let (_, _, last) = told(ask(&node, "s", &["exit", "7"])).await;
        assert_eq!(last, Some(Told::Exit(7)));
        // More than fits on the way, and nobody reads it at first.
        let stream = ask(&node, "s", &["flood"]);
        tokio::time::sleep(Duration::from_millis(300)).await;
        let (output, _, last) = told(stream).await;
        assert_eq!((output.len(), last), (FLOOD, Some(Told::Exit(0))));
        // As the agent says why.
        let (_, _, last) = told(ask(&node, "s", &["missing"])).await;
        let Some(Told::Failed(why)) = last else {
            panic!("{last:?}")
        };
        assert!(why.contains("not found"), "{why}");
        // The agent knows none of them any more.
        let (output, _, _) = told(ask(&node, "s", &["shells"])).await;
        assert_eq!(output, b"1");
        over(&node, &shim, "s").await;
    });
}

fn terminal() {
    block_on(async {
        let node = Node::new().await;
        let shim = allowed(&node, "t").await;
        let mut stream = connect(&node, "t");
        let mut request = request(&["terminal"]);
        request.terminal = Some(TerminalRequest {
            kind: "xterm".into(),
            width: 80,
            height: 25,
        });
        stream.write_all(&Asked::Run(request).frame()).unwrap();
        let resize = Asked::Resize {
            width: 100,
            height: 40,
        };
        stream.write_all(&resize.frame()).unwrap();
        let (output, _, last) = told(stream).await;
        let output = String::from_utf8(output).unwrap();
        assert_eq!(
            (&*output, last),
            ("xterm 80x25 100x40", Some(Told::Exit(0)))
        );
        over(&node, &shim, "t").await;
    });
}

/// How many programs the agent knows, the one that asks not counted.
async fn others(node: &Node, id: &str) -> usize {
    let (output, _, _) = told(ask(node, id, &["shells"])).await;
    let count: usize = String::from_utf8(output).unwrap().parse().unwrap();
    count - 1
}

fn hang_up() {
    block_on(async {
        let node = Node::new().await;
        let shim = allowed(&node, "h").await;
        let idle = ask(&node, "h", &["sleep"]);
        // One that takes no input, of which there is more than fits on the way.
        let mut full = ask(&node, "h", &["sleep"]);
        full.set_nonblocking(true).unwrap();
        let input = Asked::Input(vec![0; shell::LONGEST]).frame();
        let began = Instant::now();
        while began.elapsed() < Duration::from_secs(1) {
            if full.write(&input).is_err() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
        assert_eq!(others(&node, "h").await, 2);
        drop((idle, full));
        let began = Instant::now();
        while others(&node, "h").await > 0 {
            assert!(began.elapsed() < Duration::from_secs(10), "they stay");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        over(&node, &shim, "h").await;
    });
}

fn nonsense() {
    block_on(async {
        let node = Node::new().await;
        let shim = allowed(&node, "n").await;
        let many = request(&["x"; 2000]);
        for first in [
            Asked::EndOfInput.frame(),
            Asked::Run(many).frame(),
            vec![b'r', 0xff, 0xff, 0xff, 0xff],
            vec![b'r', 0, 0, 0, 1, b'{'],
        ] {
            let mut stream = connect(&node, "n");
            stream.write_all(&first).unwrap();
            let (_, _, last) = told(stream).await;
            assert_eq!(last, Some(Told::Failed("this is no request".into())));
        }
        // Whoever says nothing is sent away, and holds up nobody meanwhile.
        let silent = connect(&node, "n");
        let (_, _, last) = told(ask(&node, "n", &["exit", "3"])).await;
        assert_eq!(last, Some(Told::Exit(3)));
        let began = Instant::now();
        assert!(matches!(told(silent).await.2, Some(Told::Failed(_))));
        assert!(began.elapsed() < Duration::from_secs(20));
        over(&node, &shim, "n").await;
    });
}

fn machine_ends() {
    block_on(async {
        let node = Node::new().await;
        let shim = allowed(&node, "m").await;
        let stream = ask(&node, "m", &["sleep"]);
        tokio::time::sleep(Duration::from_millis(200)).await;
        let asked = told(stream);
        let ended = async {
            told(ask(&node, "m", &["die"])).await;
            shim.wait("m", "").await.unwrap();
        };
        let ((_, _, last), ()) = tokio::join!(asked, ended);
        assert!(!matches!(last, Some(Told::Exit(_))), "{last:?}");
        let began = Instant::now();
        while socket(&node, "m").exists() {
            assert!(began.elapsed() < Duration::from_secs(5), "the socket stays");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        finish(&node, &shim, "m").await;
    });
}

fn copies() {
    block_on(async {
        let node = Node::new().await;
        put_shell(&node);
        let (off, on) = ("", "debug_shell = true\n");
        let mut templates = Vec::new();
        // Twice each: a pod that boots, and one that is a copy of the template made
        // then; whoever makes it drops the other's.
        for (round, (lines, has_shell)) in [(off, false), (on, true)].into_iter().enumerate() {
            template::configure(&node, lines);
            for is_copy in [false, true] {
                let id = format!("c{round}{is_copy}");
                let (_, shim) = running(&node, &id, &["sleep"]).await;
                let file = node.state_dir().join("test").join(&id).join("state.json");
                let state: Value = serde_json::from_slice(&fs::read(file).unwrap()).unwrap();
                assert_eq!(state["machine"]["from_template"], is_copy, "{id}");
                if has_shell {
                    await_socket(&node, &id).await;
                    let (_, _, last) = told(ask(&node, &id, &["exit", "3"])).await;
                    assert_eq!(last, Some(Told::Exit(3)));
                } else {
                    tokio::time::sleep(Duration::from_millis(300)).await;
                    assert!(!socket(&node, &id).exists());
                }
                over(&node, &shim, &id).await;
                if !is_copy {
                    let before = templates.last().cloned();
                    let began = Instant::now();
                    while before.as_ref() == Some(&template::made(&node).await) {
                        assert!(began.elapsed() < Duration::from_secs(30), "the old one");
                        tokio::time::sleep(Duration::from_millis(20)).await;
                    }
                    templates.push(template::made(&node).await);
                }
            }
        }
        let shim = node.shim(&["template", "name"], node.path("").as_path(), b"");
        let name = String::from_utf8(shim.stdout).unwrap();
        assert!(templates[1].ends_with(name.trim()), "{name}");
    });
}
