//! What is installed beside the command, made from the command line's definition: manual pages, completions, and a
//! configuration file with every key.

use crate::cli::Cli;
use crate::config;
use anyhow::{Context, Result};
use clap::{Command, CommandFactory};
use clap_complete::Shell;
use clap_mangen::Man;
use std::fs;
use std::path::Path;

const SECTION: &str = "8";

/// Writes everything into a folder.
pub fn run(folder: &Path) -> Result<()> {
    write(folder).with_context(|| format!("cannot write into {}", folder.display()))
}

fn write(folder: &Path) -> std::io::Result<()> {
    let mut command = Cli::command().disable_help_subcommand(true);
    command.build();
    let (pages, completions) = (folder.join("man"), folder.join("completions"));
    fs::create_dir_all(&pages)?;
    fs::create_dir_all(&completions)?;
    manual(&command, &pages)?;
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        clap_complete::generate_to(shell, &mut command, "towpath", &completions)?;
    }
    fs::write(folder.join("towpath.toml"), config::example())
}

/// A page for the command, and one for each of its subcommands.
fn manual(command: &Command, folder: &Path) -> std::io::Result<()> {
    Man::new(command.clone()).section(SECTION).manual("Towpath").generate_to(folder)?;
    command.get_subcommands().filter(|it| !it.is_hide_set()).try_for_each(|it| manual(it, folder))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command as Process;

    /// What a program says, which must succeed.
    fn output(program: &mut Process) -> String {
        let output = program.output().expect("it runs");
        let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{program:?}: {said}");
        said.into_owned()
    }

    fn pages(command: &Command, name: &str) -> Vec<String> {
        let below = command.get_subcommands().filter(|it| !it.is_hide_set() && it.get_name() != "help");
        let below = below.flat_map(|it| pages(it, &format!("{name}-{}", it.get_name())));
        std::iter::once(format!("{name}.{SECTION}")).chain(below).collect()
    }

    #[test]
    fn everything_is_there_and_its_readers_accept_it() {
        let folder = std::env::temp_dir().join(format!("towpath-generate-{}", std::process::id()));
        run(&folder).expect("written");
        let expected = pages(&Cli::command(), "towpath");
        assert!(expected.iter().any(|page| page == "towpath-show-ports.8"), "{expected:?}");
        for page in expected {
            let path = folder.join("man").join(&page);
            let said = output(Process::new("groff").args(["-man", "-Tutf8", "-Kutf8", "-ww", "-z"]).arg(&path));
            assert_eq!(said, "", "{page}");
        }
        let script =
            "source \"$1\"; COMP_WORDS=(towpath sta); COMP_CWORD=1; _towpath towpath sta towpath; echo ${COMPREPLY[@]}";
        let bash = folder.join("completions/towpath.bash");
        assert_eq!(output(Process::new("bash").args(["-c", script, "bash"]).arg(&bash)), "status\n");
        for file in ["_towpath", "towpath.fish"] {
            assert!(fs::read_to_string(folder.join("completions").join(file)).expect(file).contains("status"));
        }
        assert_eq!(fs::read_to_string(folder.join("towpath.toml")).expect("a configuration"), config::example());
        fs::remove_dir_all(&folder).expect("removed");
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_named() {
        let error = run(Path::new("/dev/null/x")).expect_err("no folder");
        assert!(format!("{error:#}").contains("/dev/null/x"), "{error:#}");
    }
}
