//! `docs/configuration.md`, made from the keys.

use super::key::{KEYS, Kind};
use super::{CONFIG_FILE, Config, DROP_INS, NO_VALUE, VARIABLE};

/// The page.
pub fn page() -> String {
    let mut page = format!(
        "# Configuration

<!-- Made by `husk config --reference`; a test compares. -->

Nothing needs configuring. What a node does differently stands in
`{CONFIG_FILE}` and in the files `{DROP_INS}/*.toml`, which are read after it in
the order of their names. All are TOML; a key that stands in several files has
the value of the last. A key that is not known, a value that cannot be, and a
file that is not TOML are errors: no pod starts until they are mended, and the
error names the file and the line.

Each pod reads the configuration when it starts and keeps it. Nothing has to be
restarted.

    husk config                 # what is in effect, and where it was said
    husk config --check FILE    # whether a file is right, before it is put there

The environment variable `{VARIABLE}` of the shim and of `husk` names another file;
then that one is read, and nothing else.

"
    );
    let defaults = Config::default();
    for key in KEYS {
        let default = match defaults.value(key.name).to_string() {
            text if text == "\"\"" => "empty".to_owned(),
            text if text.trim_matches('"') == NO_VALUE => NO_VALUE.to_owned(),
            text => format!("`{text}`"),
        };
        let value = match key.kind {
            Kind::Number { unit, .. } => format!("{} ({unit})", key.kind),
            Kind::Path | Kind::Switch | Kind::Text { .. } => key.kind.to_string(),
        };
        page.push_str(&format!(
            "## `{}`\n\n{}\n\n- Value: {value}\n- Default: {default}\n\n",
            key.name, key.meaning
        ));
    }
    page.truncate(page.trim_end().len());
    page.push('\n');
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_in_the_docs() {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/configuration.md");
        let written = std::fs::read_to_string(file).unwrap_or_default();
        assert!(
            written == page(),
            "docs/configuration.md is stale: husk config --reference > docs/configuration.md"
        );
    }
}
