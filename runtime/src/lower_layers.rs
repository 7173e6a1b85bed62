//! The lower layers in the options of an overlay.

use std::path::Path;

const OPTION: &str = "lowerdir=";

/// As they stand there; none: the overlay has none of this form.
pub fn given(options: &[String]) -> Option<&str> {
    options
        .iter()
        .find_map(|option| option.strip_prefix(OPTION))
}

/// Their paths, topmost first. None: some are escaped, relative or hold data
/// alone, which nothing that snapshotters make is.
pub fn plain(options: &[String]) -> Option<Vec<&Path>> {
    let layers = given(options)?;
    let paths: Vec<_> = layers.split(':').map(Path::new).collect();
    let is_plain = !layers.contains('\\') && paths.iter().all(|path| path.is_absolute());
    is_plain.then_some(paths)
}

/// All options, with other layers.
pub fn replaced(options: &[String], layers: &[&str]) -> String {
    let lower = format!("{OPTION}{}", layers.join(":"));
    let options: Vec<&str> = options
        .iter()
        .map(|option| match option.starts_with(OPTION) {
            true => lower.as_str(),
            false => option.as_str(),
        })
        .collect();
    options.join(",")
}
