//! Port forwarding: connections to localhost in the pod's network namespace on
//! the node are carried to localhost in the guest.

use std::io;
use std::sync::Arc;

use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::Semaphore;

use crate::agent_client::Agent;
use crate::blocking;
use crate::error::Error;
use crate::network::{Netns, PortForward};
use crate::ports;
use crate::stdio::StdioError;
use crate::vm_process::Vm;

/// Most connections at a time.
const CONNECTIONS: usize = 256;

/// Forwards until the machine has ended. A node whose kernel cannot do this has
/// pods all the same.
pub async fn serve(netns: Netns, vm: Vm, agent: Agent) {
    let opened = blocking::run(move || PortForward::open(&netns)).await;
    let (listener, _attachment) = match opened {
        Ok(Ok(forward)) => forward.into_parts(),
        Ok(Err(error)) => {
            tracing::warn!("no port forwarding: {}", crate::error::chain(&error));
            return;
        }
        Err(error) => {
            tracing::warn!(%error, "no port forwarding");
            return;
        }
    };
    let listener = match TcpListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => {
            tracing::warn!(%error, "no port forwarding");
            return;
        }
    };
    let end_vm = vm.clone();
    tokio::select! {
        () = accept(listener, vm, agent) => {}
        _ = end_vm.ended() => {}
    }
}

async fn accept(listener: TcpListener, vm: Vm, agent: Agent) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    while let Ok(place) = Arc::clone(&places).acquire_owned().await {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::debug!(%error, "port forwarding");
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                continue;
            }
        };
        let (vm, agent) = (vm.clone(), agent.clone());
        tokio::spawn(async move {
            if let Err(error) = carry(stream, &vm, &agent).await {
                tracing::debug!("port forwarding: {}", crate::error::chain(&error));
            }
            drop(place);
        });
    }
}

async fn carry(mut stream: TcpStream, vm: &Vm, agent: &Agent) -> Result<(), Error> {
    let fail = |source: io::Error| StdioError::Socket {
        stream: "forwarded port",
        source,
    };
    let wanted = stream.local_addr().map_err(fail)?.port();
    let (near, far) = std::os::unix::net::UnixStream::pair().map_err(fail)?;
    near.set_nonblocking(true).map_err(fail)?;
    far.set_nonblocking(true).map_err(fail)?;
    let port = ports::random().map_err(fail)?;
    vm.add_host_ports(vec![(port, far.into())]).await?;
    if let Err(error) = agent.dial(wanted, port).await {
        // Mostly nobody listens there, and then nobody dials either.
        vm.remove_host_ports(vec![port]).await;
        return Err(error.into());
    }
    let mut guest = UnixStream::from_std(near).map_err(fail)?;
    // Either side may just hang up.
    let _ = copy_bidirectional(&mut stream, &mut guest).await;
    Ok(())
}
