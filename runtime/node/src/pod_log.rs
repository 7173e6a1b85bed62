//! How lines of containerd's log that are a pod's are told from others.

/// What follows the message in each line that the shim of this pod logs. Text of
/// others in such a line is quoted, with its quotes escaped, so that none can
/// look like it.
pub fn mark(namespace: &str, id: &str) -> String {
    let (namespace, id) = (namespace.escape_debug(), id.escape_debug());
    format!("{MARK}{namespace}\" pod=\"{id}\"")
}

/// With a quote that within quotes would be escaped.
const MARK: &str = " runtime=io.containerd.husk.v2 namespace=\"";

/// The pod whose line this is.
pub fn pod_of(line: &str) -> Option<&str> {
    let (_, rest) = line.split_once(MARK)?;
    let (_, rest) = rest.split_once("\" pod=\"")?;
    let (id, _) = rest.split_once('"')?;
    Some(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_can_forge_it() {
        let mark = mark("k8s.io", "abc");
        let line = format!("time=\"1\" level=info msg=\"guest\"{mark} console=\"x\"");
        assert_eq!(pod_of(&line), Some("abc"));
        let forged = super::mark("k8s.io", "other");
        let line = format!("time=\"1\" level=info msg={forged:?}{mark} console={forged:?}");
        assert_eq!(pod_of(&line), Some("abc"));
        assert_eq!(pod_of("time=\"1\" level=info msg=\"of containerd\""), None);
    }
}
