//! The lines that a pod's shim adds to a file, as they come.

use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use husk_node::trace::{self, LINE, Line};

/// Such a file, open. What is in it is read also when it is there no more.
#[derive(Debug)]
pub struct Lines {
    path: PathBuf,
    file: File,
    /// What was read of a line that is not whole.
    rest: Vec<u8>,
}

impl Lines {
    /// That of the pod with this directory, if it is traced.
    pub fn open(dir: &Path) -> Option<Self> {
        let path = dir.join(trace::FILE);
        let file = File::open(&path).ok()?;
        Some(Self {
            path,
            file,
            rest: Vec::new(),
        })
    }

    /// What has come since. What is no such line, a later shim's perhaps, is left out.
    pub fn read(&mut self) -> Vec<Line> {
        let mut lines = self.read_file();
        // Another may have taken its place; then nothing is added to this one.
        if let Some(next) = self.next() {
            lines.extend(self.read_file());
            self.file = next;
            self.rest.clear();
            lines.extend(self.read_file());
        }
        lines
    }

    fn next(&self) -> Option<File> {
        let place = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
        let now = place(fs::metadata(&self.path).ok()?);
        let open = place(self.file.metadata().ok()?);
        (now != open).then(|| File::open(&self.path).ok()).flatten()
    }

    fn read_file(&mut self) -> Vec<Line> {
        let mut lines = Vec::new();
        let mut block = [0; 4096];
        loop {
            let length = match self.file.read(&mut block) {
                Ok(0) => return lines,
                Ok(length) => length,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(_) => return lines,
            };
            for byte in &block[..length] {
                match byte {
                    b'\n' => {
                        lines.extend(serde_json::from_slice::<Line>(&self.rest).ok());
                        self.rest.clear();
                    }
                    // One that is longer is none.
                    byte if self.rest.len() <= LINE => self.rest.push(*byte),
                    _ => {}
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use husk_node::state::Timeline;
    use std::io::Write;

    fn line(number: u64) -> Line {
        Line::Timeline(Timeline {
            request_ns: number,
            ..Timeline::default()
        })
    }

    #[test]
    fn no_line_is_missed() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Lines::open(dir.path()).is_none());
        trace::append(dir.path(), &line(0)).unwrap();
        let mut lines = Lines::open(dir.path()).unwrap();
        let mut read = lines.read();
        // More than one file holds, looked at now and then.
        for number in 1..2000 {
            trace::append(dir.path(), &line(number)).unwrap();
            if number % 7 == 0 {
                read.extend(lines.read());
            }
        }
        // It goes with the pod's directory.
        fs::remove_file(dir.path().join(trace::FILE)).unwrap();
        read.extend(lines.read());
        let all: Vec<_> = (0..2000).map(line).collect();
        assert!(read == all, "{} of 2000", read.len());
    }

    #[test]
    fn what_is_no_line_is_left_out() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(trace::FILE);
        let mut file = File::create(&path).unwrap();
        let good = serde_json::to_string(&line(7)).unwrap();
        let (begin, end) = good.split_at(9);
        write!(
            file,
            "nonsense\n{}\n{{\"news\":{{}}}}\n{begin}",
            "x".repeat(3 * LINE)
        )
        .unwrap();
        let mut lines = Lines::open(dir.path()).unwrap();
        assert_eq!(lines.read(), []);
        writeln!(file, "{end}").unwrap();
        assert_eq!(lines.read(), [line(7)]);
    }
}
