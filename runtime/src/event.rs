//! Events for containerd, delivered in order and kept while containerd
//! restarts.

use std::time::Duration;

use containerd_shim_protos::protobuf::MessageDyn;
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim::events::ForwardRequest;
use containerd_shim_protos::shim_async::{Client, EventsClient};
use protobuf::MessageField;
use protobuf::well_known_types::any::Any;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};
use ttrpc::context;

use crate::clock;

/// Longest time for containerd to take one event.
const FORWARD_DEADLINE: Duration = Duration::from_secs(5);

/// How long one event is tried again before it is given up.
const PATIENCE: Duration = Duration::from_secs(15 * 60);

/// Longest pause between two tries.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// Queue of the events of a pod.
#[derive(Clone, Debug)]
pub struct EventSender {
    namespace: String,
    queue: Option<mpsc::UnboundedSender<Envelope>>,
}

/// Delivers what is in the queue.
#[derive(Debug)]
pub struct Publisher {
    delivery: Option<JoinHandle<()>>,
}

impl Publisher {
    /// Delivers to containerd's ttrpc socket at `address`; empty: nowhere.
    pub fn start(address: &str, namespace: &str) -> (EventSender, Self) {
        let namespace = namespace.to_owned();
        if address.is_empty() {
            let sender = EventSender {
                namespace,
                queue: None,
            };
            return (sender, Self { delivery: None });
        }
        let address = match address.strip_prefix("unix://") {
            Some(_) => address.to_owned(),
            None => format!("unix://{address}"),
        };
        let (queue, receiver) = mpsc::unbounded_channel();
        let delivery = tokio::spawn(deliver(address, namespace.clone(), receiver));
        let sender = EventSender {
            namespace,
            queue: Some(queue),
        };
        let publisher = Self {
            delivery: Some(delivery),
        };
        (sender, publisher)
    }

    /// Waits until everything is delivered, once all senders are gone.
    pub async fn finish(self, patience: Duration) {
        if let Some(delivery) = self.delivery
            && timeout(patience, delivery).await.is_err()
        {
            tracing::warn!("events are lost: containerd does not take them");
        }
    }
}

impl EventSender {
    /// Queues an event.
    pub fn send(&self, topic: &str, event: &dyn MessageDyn) {
        let Some(queue) = &self.queue else { return };
        let value = match event.write_to_bytes_dyn() {
            Ok(value) => value,
            Err(error) => {
                tracing::error!(topic, %error, "event");
                return;
            }
        };
        let envelope = Envelope {
            timestamp: MessageField::some(clock::timestamp(clock::wall_ns())),
            namespace: self.namespace.clone(),
            topic: topic.to_owned(),
            event: MessageField::some(Any {
                type_url: event.descriptor_dyn().full_name().to_owned(),
                value,
                ..Any::default()
            }),
            ..Envelope::default()
        };
        // The delivery ends after the last sender.
        let _ = queue.send(envelope);
    }
}

async fn deliver(address: String, namespace: String, mut queue: mpsc::UnboundedReceiver<Envelope>) {
    let mut client = None;
    while let Some(envelope) = queue.recv().await {
        let topic = envelope.topic.clone();
        let request = ForwardRequest {
            envelope: MessageField::some(envelope),
            ..ForwardRequest::default()
        };
        let began = Instant::now();
        let mut pause = Duration::from_millis(20);
        loop {
            match forward(&address, &namespace, &mut client, &request).await {
                Ok(()) => break,
                Err(ttrpc::Error::RpcStatus(status)) if is_final(status.code()) => {
                    tracing::error!(topic, error = status.message, "containerd refuses an event");
                    break;
                }
                Err(error) if began.elapsed() > PATIENCE => {
                    tracing::error!(topic, %error, "an event is lost");
                    break;
                }
                Err(error) => {
                    tracing::debug!(topic, %error, "event is tried again");
                    client = None;
                    sleep(pause).await;
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
            }
        }
    }
}

/// Another try would not help: containerd does not want this event. Whatever else
/// it says, it may be about to restart.
fn is_final(code: ttrpc::Code) -> bool {
    matches!(
        code,
        ttrpc::Code::INVALID_ARGUMENT | ttrpc::Code::UNIMPLEMENTED
    )
}

async fn forward(
    address: &str,
    namespace: &str,
    client: &mut Option<EventsClient>,
    request: &ForwardRequest,
) -> ttrpc::Result<()> {
    let events = match client {
        Some(events) => events,
        None => client.insert(EventsClient::new(Client::connect(address).await?)),
    };
    let mut context = context::with_duration(FORWARD_DEADLINE);
    context.add(
        "containerd-namespace-ttrpc".to_owned(),
        namespace.to_owned(),
    );
    events.forward(context, request).await.map(drop)
}
