//! containerd's side: the Task client, and the service that takes events.

use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use containerd_shim_protos::api::Empty;
use containerd_shim_protos::events::task::{TaskExit, TaskOOM};
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::shim::events::ForwardRequest;
use containerd_shim_protos::shim_async::{Client, Events, TaskClient, create_events};
use ttrpc::r#async::{Server, TtrpcContext};
use ttrpc::context::{Context, with_duration};
use ttrpc::{Code, Error};

/// Topics and contents of events, in the order of their arrival.
type Log = Arc<Mutex<Vec<(String, Vec<u8>)>>>;

/// Takes events on a socket.
pub struct EventService {
    path: PathBuf,
    log: Log,
    server: Option<Server>,
}

#[derive(Clone)]
struct Recorder(Log);

#[async_trait]
impl Events for Recorder {
    async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        let envelope = request.envelope.unwrap();
        assert_eq!(envelope.namespace, "test");
        let event = envelope.event.unwrap();
        let topic = envelope.topic;
        self.0.lock().unwrap().push((topic, event.value));
        Ok(Empty::default())
    }
}

impl EventService {
    /// Begins on a socket in `dir`.
    pub async fn start(dir: &Path) -> Self {
        let mut service = Self {
            path: dir.join("containerd.sock.ttrpc"),
            log: Log::default(),
            server: None,
        };
        service.resume().await;
        service
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Goes away, as containerd does when it restarts.
    pub async fn stop(&mut self) {
        self.server.take().unwrap().shutdown().await.unwrap();
        std::fs::remove_file(&self.path).unwrap();
    }

    /// Comes back.
    pub async fn resume(&mut self) {
        let listener = UnixListener::bind(&self.path).unwrap();
        let mut server = Server::new()
            .add_listener(listener.try_into().unwrap())
            .register_service(create_events(Arc::new(Recorder(self.log.clone()))));
        server.start().await.unwrap();
        self.server = Some(server);
    }

    /// Topics so far.
    pub fn topics(&self) -> Vec<String> {
        let log = self.log.lock().unwrap();
        log.iter().map(|(topic, _)| topic.clone()).collect()
    }

    /// Waits until an event of this topic has come, `count` of them.
    pub async fn wait_for(&self, topic: &str, count: usize) {
        self.wait_until(topic, count, Duration::from_secs(10)).await;
    }

    /// Likewise, with the time it may take.
    pub async fn wait_until(&self, topic: &str, count: usize, limit: Duration) {
        let began = Instant::now();
        while self.topics().iter().filter(|t| *t == topic).count() < count {
            assert!(began.elapsed() < limit, "no {topic} in {:?}", self.topics());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Ends of processes so far: id and code.
    pub fn exits(&self) -> Vec<(String, u32)> {
        let log = self.log.lock().unwrap();
        log.iter()
            .filter(|(topic, _)| topic == "/tasks/exit")
            .map(|(_, value)| TaskExit::parse_from_bytes(value).unwrap())
            .map(|exit| (exit.id, exit.exit_status))
            .collect()
    }

    /// Containers that ran out of memory so far.
    pub fn ooms(&self) -> Vec<String> {
        let log = self.log.lock().unwrap();
        log.iter()
            .filter(|(topic, _)| topic == "/tasks/oom")
            .map(|(_, value)| TaskOOM::parse_from_bytes(value).unwrap().container_id)
            .collect()
    }
}

/// Connects to a shim.
pub async fn connect(address: &str) -> TaskClient {
    TaskClient::new(Client::connect(address).await.unwrap())
}

/// For calls that must not take long.
pub fn soon() -> Context {
    with_duration(Duration::from_secs(20))
}

/// The status of a call that had to fail.
pub fn refusal<T: std::fmt::Debug>(answer: ttrpc::Result<T>) -> (Code, String) {
    match answer.unwrap_err() {
        Error::RpcStatus(status) => (status.code(), status.message),
        other => panic!("{other}"),
    }
}
