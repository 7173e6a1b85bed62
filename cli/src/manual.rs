//! Manual pages and completions, made from the command line's own description.

use std::path::Path;

use anyhow::Context;
use clap::CommandFactory;
use clap_complete::Shell;

use crate::answer::Answer;
use crate::arguments::Arguments;

/// The completions for a shell.
///
/// # Errors
/// They are no text.
pub fn completions(shell: Shell) -> anyhow::Result<Answer> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Arguments::command(), "husk", &mut script);
    Ok(Answer::done(String::from_utf8(script)?))
}

/// Writes a page for the command and one for each subcommand.
///
/// # Errors
/// The directory cannot be written to.
pub fn pages(dir: &Path) -> anyhow::Result<Answer> {
    let command = Arguments::command();
    clap_mangen::generate_to(command, dir)
        .with_context(|| format!("manual pages in {}", dir.display()))?;
    Ok(Answer::done(String::new()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn each_command_has_its_page() {
        let dir = tempfile::tempdir().unwrap();
        pages(dir.path()).unwrap();
        for page in ["husk.1", "husk-ps.1", "husk-install.1"] {
            let text = fs::read_to_string(dir.path().join(page)).unwrap();
            assert!(text.contains(".SH NAME"), "{page}: {text}");
        }
        assert!(!dir.path().join("husk-man.1").exists());
    }

    #[test]
    fn shells_know_the_commands() {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let script = completions(shell).unwrap().text;
            assert!(script.contains("inspect") && script.contains("timeline"));
        }
    }
}
