//! Text for terminals. Names come from tenants, versions from guests: nothing
//! of that may move a cursor or turn a line around.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Longest text shown of somebody else's, characters.
const LONGEST: usize = 256;

/// `text` in one line without anything that acts on a terminal.
pub fn plain(text: &str) -> String {
    let mut shown = String::new();
    for (at, c) in text.chars().enumerate() {
        if at == 16 * LONGEST {
            shown.push('…');
            break;
        }
        if acts(c) {
            shown.extend(c.escape_default());
        } else {
            shown.push(c);
        }
    }
    shown
}

/// The same for each line of a text that has several: what is to be copied.
pub fn plain_lines(text: &str) -> String {
    let lines: Vec<_> = text.lines().map(plain).collect();
    lines.join("\n")
}

/// The same, and short.
pub fn short(text: &str) -> String {
    let mut cut: String = text.chars().take(LONGEST).collect();
    if cut.len() < text.len() {
        cut.push('…');
    }
    plain(&cut)
}

/// Control characters, and those that show nothing or change the direction.
fn acts(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{ad}' | '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

/// JSON with nothing but ASCII, since U+009B begins a command of a terminal.
pub fn ascii(json: &str) -> String {
    let mut text = String::with_capacity(json.len());
    for c in json.chars() {
        if c.is_ascii() && c != '\x7f' {
            text.push(c);
            continue;
        }
        // RFC 8259, section 7: as UTF-16, surrogates apart.
        for unit in c.encode_utf16(&mut [0; 2]) {
            text.push_str(&format!("\\u{unit:04x}"));
        }
    }
    text
}

/// Rows below their headings, in columns.
pub fn table(headings: &[&str], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = headings.iter().map(|word| word.len()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    let headings = headings.iter().map(|word| (*word).to_owned()).collect();
    for row in std::iter::once(&headings).chain(rows) {
        let mut line = String::new();
        for (width, cell) in widths.iter().zip(row) {
            line.push_str(&format!("{cell:<width$}  "));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// Facts, each behind its name.
pub fn facts(facts: &[(&str, String)]) -> String {
    let width = facts.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let line = |(name, value): &(&str, String)| format!("{name:<width$}  {value}\n");
    facts.iter().map(line).collect()
}

/// A length of time, roughly.
pub fn age(time: Duration) -> String {
    let seconds = time.as_secs();
    match seconds {
        0..=119 => format!("{seconds} s"),
        120..=7199 => format!("{} min", seconds / 60),
        7200..=172_799 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86_400),
    }
}

/// A moment in UTC, as RFC 3339 has it.
pub fn utc(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (days, seconds) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    // Years begin with March here, so that a leap day is a year's last, and
    // March 1 of the year 0 was 719468 days before 1970.
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * from_march + 2) / 5 + 1;
    let month = (from_march + 2) % 12 + 1;
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hours, minutes) = (seconds / 3600, seconds / 60 % 60);
    format!(
        "{year:04}-{month:02}-{day:02}T{hours:02}:{minutes:02}:{:02}.{:03}Z",
        seconds % 60,
        since.subsec_millis()
    )
}

/// Memory.
pub fn mib(kib: u64) -> String {
    format!("{}.{} MiB", kib / 1024, kib % 1024 * 10 / 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_acts_on_the_terminal() {
        assert_eq!(plain("häh\x1b[2J\n\u{9b}1m"), "häh\\u{1b}[2J\\n\\u{9b}1m");
        assert_eq!(plain("a\u{202e}b\u{200b}"), "a\\u{202e}b\\u{200b}");
        assert_eq!(short(&"x".repeat(1000)).chars().count(), LONGEST + 1);
        assert_eq!(plain_lines("a\n\x1bb\r\n"), "a\n\\u{1b}b");
        assert!(plain(&"x".repeat(100_000)).len() < 5000);
        let json = serde_json::to_string("ä\u{9b}\u{1f600}\u{7f}\x1b").unwrap();
        let escaped = ascii(&json);
        assert!(escaped.is_ascii() && !escaped.contains('\x7f'));
        let back: String = serde_json::from_str(&escaped).unwrap();
        assert_eq!(back, "ä\u{9b}\u{1f600}\u{7f}\x1b");
    }

    #[test]
    fn columns_stand_below_each_other() {
        let rows = [vec!["ä".into(), "1".into()], vec!["bcd".into(), "2".into()]];
        assert_eq!(table(&["A", "B"], &rows), "A    B\nä    1\nbcd  2\n");
    }

    #[test]
    fn sizes_and_times_are_short() {
        assert_eq!(mib(1536), "1.5 MiB");
        assert_eq!(mib(1023), "0.9 MiB");
        assert_eq!(age(Duration::from_secs(119)), "119 s");
        assert_eq!(age(Duration::from_secs(3 * 86_400)), "3 d");
        // As `date --utc --date=@SECONDS` has them.
        for (seconds, shown) in [
            (0, "1970-01-01T00:00:00.007Z"),
            (951_782_400, "2000-02-29T00:00:00.007Z"),
            (1_709_251_199, "2024-02-29T23:59:59.007Z"),
            (1_735_689_599, "2024-12-31T23:59:59.007Z"),
            (4_107_542_400, "2100-03-01T00:00:00.007Z"),
        ] {
            let time = UNIX_EPOCH + Duration::from_millis(seconds * 1000 + 7);
            assert_eq!(utc(time), shown);
        }
    }
}
