//! `husk config`.

use std::path::Path;

use serde_json::{Value, json};

use husk_node::config::{self, Loaded, Sources, key::KEYS};

use crate::answer::{Answer, WRONG};
use crate::arguments::ConfigArguments;
use crate::text;

/// Shows the configuration, its reference, or what is wrong with a file.
///
/// # Errors
/// The node's configuration is wrong.
pub fn run(asked: &ConfigArguments, json: bool) -> anyhow::Result<Answer> {
    if asked.reference {
        return Ok(Answer::done(config::page()));
    }
    if let Some(file) = &asked.check {
        return check(file, json);
    }
    // Each pod would be refused with the same words.
    show(&Sources::of_node().load()?, json)
}

fn check(file: &Path, json: bool) -> anyhow::Result<Answer> {
    let errors = config::check(file).err().unwrap_or_default();
    let errors: Vec<String> = errors
        .into_iter()
        .map(|error| format!("{:#}", anyhow::Error::from(error)))
        .collect();
    let code = if errors.is_empty() { 0 } else { WRONG };
    let answer = if json {
        Answer::json(&json!({ "file": file, "errors": errors }))?
    } else if errors.is_empty() {
        Answer::done(format!(
            "{} is right\n",
            text::plain(&file.to_string_lossy())
        ))
    } else {
        let lines = errors.iter().map(|error| text::plain(error) + "\n");
        Answer::done(lines.collect())
    };
    Ok(answer.with_code(code))
}

/// What is in effect.
///
/// # Errors
/// It cannot be written as JSON.
pub fn show(loaded: &Loaded, json: bool) -> anyhow::Result<Answer> {
    if json {
        let keys: Vec<Value> = KEYS
            .iter()
            .map(|key| {
                let place = loaded.places.get(key.name);
                json!({
                    "key": key.name,
                    "value": loaded.config.value(key.name),
                    "from": place.map(|place| json!({ "file": place.path, "line": place.line })),
                })
            })
            .collect();
        return Answer::json(&json!({ "files": loaded.files, "keys": keys }));
    }
    let rows: Vec<_> = KEYS
        .iter()
        .map(|key| {
            let from = loaded.places.get(key.name).map_or_else(
                || "default".to_owned(),
                |place| {
                    format!(
                        "{}:{}",
                        text::plain(&place.path.to_string_lossy()),
                        place.line
                    )
                },
            );
            let value = text::short(&loaded.config.value(key.name).to_string());
            vec![key.name.to_owned(), value, from]
        })
        .collect();
    Ok(Answer::done(text::table(&["KEY", "VALUE", "FROM"], &rows)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use husk_node::config::{Config, Place};

    fn loaded() -> Loaded {
        let place = Place {
            path: "/etc/husk/conf.d/a.toml".into(),
            line: 3,
        };
        Loaded {
            config: Config {
                kernel: "/k".into(),
                ..Config::default()
            },
            places: [("kernel", place)].into(),
            files: vec!["/etc/husk/conf.d/a.toml".into()],
        }
    }

    #[test]
    fn tells_where_a_value_was_said() {
        let text = show(&loaded(), false).unwrap().text;
        let line = |key: &str| text.lines().find(|line| line.starts_with(key)).unwrap();
        assert!(
            line("kernel ").ends_with("/etc/husk/conf.d/a.toml:3"),
            "{text}"
        );
        assert!(line("vmm ").ends_with("default"), "{text}");
        let answer = show(&loaded(), true).unwrap();
        let json: Value = serde_json::from_str(&answer.text).unwrap();
        let kernel = json["keys"].as_array().unwrap().iter();
        let kernel = kernel.clone().find(|key| key["key"] == "kernel").unwrap();
        assert_eq!(kernel["value"], "/k");
        assert_eq!(kernel["from"]["line"], 3);
    }

    #[test]
    fn lists_what_is_wrong_with_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("c.toml");
        std::fs::write(&file, "kernle = '/k'\nfirst_uid = 0\n").unwrap();
        let answer = check(&file, false).unwrap();
        assert_eq!(answer.code, WRONG);
        assert_eq!(answer.text.lines().count(), 2);
        assert!(
            answer.text.contains("did you mean `kernel`?"),
            "{}",
            answer.text
        );
        std::fs::write(&file, "kernel = '/k'\n").unwrap();
        assert_eq!(check(&file, true).unwrap().code, 0);
    }
}
