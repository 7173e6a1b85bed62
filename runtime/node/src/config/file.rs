//! One file of the configuration: TOML whose every key and value is checked
//! where it stands.

use std::ops::Range;
use std::path::Path;

use toml::Value;
use toml::de::{DeTable, DeValue};

use super::ConfigError;
use super::key::{self, Key, Kind};

/// A key with its value and line.
type Said = (&'static str, (Value, usize));

/// What a file says.
///
/// # Errors
/// Everything that is wrong in it, at least one thing; text that is no TOML hides
/// the rest.
pub fn parse(path: &Path, text: &str) -> Result<Vec<Said>, Vec<ConfigError>> {
    let wrong = |span: Range<usize>, message: String| ConfigError::Parse {
        path: path.to_owned(),
        line: line(text, span),
        // toml's own text has several lines; containerd's errors have one.
        message: message.replace('\n', ", "),
    };
    let table = DeTable::parse(text).map_err(|error| {
        let span = error.span().unwrap_or_default();
        vec![wrong(span, error.message().to_owned())]
    })?;
    let (mut said, mut errors) = (Vec::new(), Vec::new());
    for (name, value) in table.into_inner() {
        let Some(key) = key::find(name.get_ref()) else {
            errors.push((name.span(), unknown(name.get_ref())));
            continue;
        };
        match checked(key, value.get_ref()) {
            Ok(checked) => said.push((key.name, (checked, line(text, name.span())))),
            Err(message) => errors.push((value.span(), message)),
        }
    }
    if errors.is_empty() {
        return Ok(said);
    }
    errors.sort_by_key(|(span, _)| span.start);
    let errors = errors.into_iter();
    Err(errors.map(|(span, message)| wrong(span, message)).collect())
}

fn line(text: &str, span: Range<usize>) -> usize {
    let before = text.get(..span.start).unwrap_or_default();
    before.matches('\n').count() + 1
}

fn unknown(name: &str) -> String {
    let name: String = name.chars().take(64).collect();
    let advice = match key::nearest(&name) {
        Some(near) => format!("did you mean `{near}`?"),
        None => {
            let known: Vec<_> = key::KEYS.iter().map(|key| key.name).collect();
            format!("known are {}", known.join(", "))
        }
    };
    format!("unknown key `{}`; {advice}", name.escape_debug())
}

/// The value, or what is wrong with it.
fn checked(key: &Key, value: &DeValue<'_>) -> Result<Value, String> {
    let (fits, shown) = match (key.kind, value) {
        (Kind::Path, DeValue::String(text)) => (
            text.starts_with('/') && !text.contains('\0'),
            format!("{text:?}"),
        ),
        (Kind::Text { longest }, DeValue::String(text)) => {
            let printable = text.bytes().all(|b| (b' '..=b'~').contains(&b));
            (text.len() <= longest && printable, format!("{text:?}"))
        }
        (Kind::Switch, DeValue::Boolean(value)) => return Ok(Value::Boolean(*value)),
        (Kind::Number { least, most, .. }, DeValue::Integer(number)) => {
            let parsed = i64::from_str_radix(number.as_str(), number.radix()).ok();
            let range = i64::from(least)..=i64::from(most);
            if let Some(number) = parsed.filter(|number| range.contains(number)) {
                return Ok(Value::Integer(number));
            }
            (false, number.as_str().to_owned())
        }
        (_, other) => (false, kind_of(other).to_owned()),
    };
    match value {
        DeValue::String(text) if fits => Ok(Value::String(text.clone().into_owned())),
        _ => {
            let shown: String = shown.chars().take(128).collect();
            Err(format!(
                "`{}` is {shown}; it must be {}",
                key.name, key.kind
            ))
        }
    }
}

fn kind_of(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "a string",
        DeValue::Integer(_) => "a whole number",
        DeValue::Float(_) => "a number with a fraction",
        DeValue::Boolean(_) => "true or false",
        DeValue::Datetime(_) => "a date",
        DeValue::Array(_) => "a list",
        DeValue::Table(_) => "a table",
    }
}
