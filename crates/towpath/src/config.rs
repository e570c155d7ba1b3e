//! The configuration file. Its keys are `ports` and the long options of `up`, and its values go through the options' own
//! parsers and become their defaults, so that file and command line cannot differ in what they mean.

use crate::cli::Cli;
use crate::text::suggestion;
use clap::error::{ContextKind, ContextValue, Error as ClapError};
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command, CommandFactory, FromArgMatches};
use std::any::TypeId;
use std::error::Error as _;
use std::io::Read;
use std::path::{Path, PathBuf};
use toml::Spanned;
use toml::de::{DeString, DeTable, DeValue};

/// A larger file is not one of ours.
const LARGEST: u64 = 1 << 20;
/// The subcommand whose options are the keys; others have some of them.
const WHOLE: &str = "up";
/// Names the file, so it is no key of it.
const OPTION: &str = "config";

/// A configuration file that cannot be used.
#[derive(thiserror::Error, Debug)]
pub enum Error {
    /// The system's words
    #[error("cannot read {}: {error}", path.display())]
    Unreadable { path: PathBuf, error: std::io::Error },
    /// What is wrong, and where
    #[error("{}:{line}:{column}: {why}", path.display())]
    Wrong { path: PathBuf, line: usize, column: usize, why: String },
}

/// What is wrong with a text at this byte.
struct Fault {
    at: usize,
    why: String,
}

/// A key of the file, and what follows it, as the command line would have it.
#[derive(Debug, PartialEq)]
struct Setting {
    name: String,
    values: Vec<String>,
    line: usize,
}

/// The command line, with the settings of a file where it names one; then also where each setting came from.
pub fn command_line() -> Result<(Cli, Option<String>), Error> {
    let command = Cli::command();
    let matches = command.clone().get_matches();
    let Some((subcommand, path)) = named_file(&matches) else { return Ok((cli(&matches), None)) };
    let settings = read(path, &command)?;
    let matches = with_defaults(command.clone(), subcommand, &settings).get_matches();
    let sources = sources(path, &settings, options(&command, subcommand), &matches);
    Ok((cli(&matches), Some(sources)))
}

fn cli(matches: &ArgMatches) -> Cli {
    Cli::from_arg_matches(matches).unwrap_or_else(|error| error.exit())
}

fn named_file(matches: &ArgMatches) -> Option<(&str, &Path)> {
    let (subcommand, matches) = matches.subcommand()?;
    let path: Option<&PathBuf> = matches.try_get_one(OPTION).ok()?;
    Some((subcommand, path?))
}

/// The options of a subcommand that may be in a file.
fn options<'a>(command: &'a Command, subcommand: &str) -> impl Iterator<Item = &'a Arg> {
    let all = command.find_subcommand(subcommand).into_iter().flat_map(Command::get_arguments);
    all.filter(|option| option.get_id() != OPTION && !option.is_global_set())
}

/// The name that an option has in a file: that of the command line, without `--`.
fn key(option: &Arg) -> &str {
    option.get_long().unwrap_or(option.get_id().as_str())
}

fn read(path: &Path, command: &Command) -> Result<Vec<Setting>, Error> {
    let unreadable = |error| Error::Unreadable { path: path.into(), error };
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).map_err(unreadable)?;
    file.take(LARGEST + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    parse(&bytes, command).map_err(|Fault { at, why }| {
        let before = String::from_utf8_lossy(&bytes[..at]);
        let (line, column) = (line(&before), before.chars().rev().take_while(|letter| *letter != '\n').count() + 1);
        Error::Wrong { path: path.into(), line, column, why }
    })
}

/// The line that ends this text.
fn line(text: &str) -> usize {
    text.matches('\n').count() + 1
}

fn parse(bytes: &[u8], command: &Command) -> Result<Vec<Setting>, Fault> {
    if bytes.len() as u64 > LARGEST {
        return Err(Fault { at: 0, why: format!("it has more than {LARGEST} bytes: no configuration of towpath") });
    }
    let text = std::str::from_utf8(bytes)
        .map_err(|error| Fault { at: error.valid_up_to(), why: "this is no text in UTF-8".into() })?;
    let table = DeTable::parse(text).map_err(|error| Fault {
        at: error.span().map_or(0, |span| span.start),
        why: format!("this is no TOML: {}", error.message().replace('\n', ", ")),
    })?;
    let mut settings: Vec<_> = table.get_ref().iter().collect();
    settings.sort_by_key(|(key, _)| key.span().start);
    let setting = |(name, value): (&Spanned<DeString>, &Spanned<DeValue>)| {
        let at = name.span().start;
        let option = option_of_key(name.get_ref(), command).map_err(|why| Fault { at, why })?;
        Ok(Setting { name: key(option).into(), values: values(option, value)?, line: line(&text[..at]) })
    };
    settings.into_iter().map(setting).collect()
}

fn option_of_key<'a>(name: &str, command: &'a Command) -> Result<&'a Arg, String> {
    options(command, WHOLE).find(|option| key(option) == name).ok_or_else(|| {
        let names: Vec<_> = options(command, WHOLE).map(key).collect();
        format!("unknown key {name:?}{}", suggestion(&names, name))
    })
}

fn values(option: &Arg, value: &Spanned<DeValue>) -> Result<Vec<String>, Fault> {
    match (option.get_action(), value.get_ref()) {
        (ArgAction::Append, DeValue::Array(values)) => values.iter().map(|value| scalar(option, value)).collect(),
        (ArgAction::Append, _) => Err(wrong_type(option, value, "a list, as in [\"eth0\", \"eth1\"]")),
        _ => Ok(vec![scalar(option, value)?]),
    }
}

/// What a value is in TOML.
enum Kind {
    Text,
    Number,
    Switch,
}

fn kind(option: &Arg) -> Kind {
    let of = |types: &[TypeId]| types.iter().any(|it| option.get_value_parser().type_id() == *it);
    let numbers = [TypeId::of::<u16>(), TypeId::of::<u32>(), TypeId::of::<u64>(), TypeId::of::<usize>()];
    match () {
        () if of(&numbers) => Kind::Number,
        () if of(&[TypeId::of::<bool>()]) => Kind::Switch,
        () => Kind::Text,
    }
}

/// One value as the command line would have it, found good by the option's own parser.
fn scalar(option: &Arg, value: &Spanned<DeValue>) -> Result<String, Fault> {
    let text = match (kind(option), value.get_ref()) {
        (Kind::Switch, DeValue::Boolean(on)) => on.to_string(),
        (Kind::Number, DeValue::Integer(number)) => i128::from_str_radix(number.as_str(), number.radix())
            .map_err(|error| fault(option, value, &error.to_string()))?
            .to_string(),
        (Kind::Text, DeValue::String(text)) => text.to_string(),
        (Kind::Switch, _) => return Err(wrong_type(option, value, "true or false, without quotes")),
        (Kind::Number, _) => return Err(wrong_type(option, value, "a number without quotes")),
        (Kind::Text, _) => return Err(wrong_type(option, value, "text in quotes")),
    };
    check(option, &text).map_err(|why| fault(option, value, &why))?;
    Ok(text)
}

fn wrong_type(option: &Arg, value: &Spanned<DeValue>, wanted: &str) -> Fault {
    fault(option, value, &format!("it takes {wanted}"))
}

fn fault(option: &Arg, value: &Spanned<DeValue>, why: &str) -> Fault {
    Fault { at: value.span().start, why: format!("wrong value of {}: {why}", key(option)) }
}

fn check(option: &Arg, text: &str) -> Result<(), String> {
    let words = match option.get_long() {
        Some(long) => vec!["towpath".into(), format!("--{long}={text}")],
        None => vec!["towpath".into(), "--".into(), text.into()],
    };
    let command = Command::new("towpath").arg(option.clone()).disable_help_flag(true);
    command.try_get_matches_from(words).map(drop).map_err(|error| reason(&error, text))
}

/// Why the command line's parser refuses a value, without what concerns the command line.
fn reason(error: &ClapError, text: &str) -> String {
    match (error.source(), error.get(ContextKind::ValidValue)) {
        (Some(why), _) => why.to_string(),
        (None, Some(ContextValue::Strings(names))) => {
            let names: Vec<_> = names.iter().map(String::as_str).collect();
            format!("there is no {text:?}{}", suggestion(&names, text))
        }
        _ => format!("{text:?} is not possible"),
    }
}

fn with_defaults(command: Command, subcommand: &str, settings: &[Setting]) -> Command {
    let values = |option: &Arg| settings.iter().find(|setting| setting.name == key(option));
    let known: Vec<_> = options(&command, subcommand)
        .filter_map(|option| Some((option.get_id().to_string(), values(option)?.values.clone())))
        .collect();
    command.mut_subcommand(subcommand, |subcommand| {
        known
            .into_iter()
            .fold(subcommand, |subcommand, (id, values)| subcommand.mut_arg(id, |option| option.default_values(values)))
    })
}

/// Every setting, and where it came from.
fn sources<'a>(
    path: &Path,
    settings: &[Setting],
    options: impl Iterator<Item = &'a Arg>,
    matches: &ArgMatches,
) -> String {
    let matches = matches.subcommand().map_or(matches, |(_, matches)| matches);
    let describe = |option: &Arg| {
        let values: Vec<_> = matches.get_raw(option.get_id().as_str())?.map(|value| value.to_string_lossy()).collect();
        let origin = match settings.iter().find(|setting| setting.name == key(option)) {
            _ if matches.value_source(option.get_id().as_str()) == Some(ValueSource::CommandLine) => {
                "command line".into()
            }
            Some(setting) => format!("line {}", setting.line),
            None => "default".into(),
        };
        Some(format!("{} {} ({origin})", key(option), values.join(" ")))
    };
    let all: Vec<_> = options.filter_map(describe).collect();
    format!("settings with {}: {}", path.display(), all.join(", "))
}

/// A file with every key, all of them as comments, with their defaults.
pub fn example() -> String {
    let head = "# Settings of towpath, read where a command line names this file: towpath up --config FILE.\n\
        # What the command line says goes before. A key that is not known is an error.\n";
    options(&Cli::command(), WHOLE).filter(|option| !option.is_hide_set()).fold(head.into(), |text, option| {
        let help = option.get_help().map(ToString::to_string).unwrap_or_default();
        let choices: Vec<_> = option.get_possible_values().iter().map(|it| it.get_name().to_owned()).collect();
        let choices = match kind(option) {
            Kind::Text if !choices.is_empty() => format!(": {}", choices.join(", ")),
            _ => String::new(),
        };
        format!("{text}\n{}#{} = {}\n", comment(&format!("{help}{choices}.")), key(option), example_value(option))
    })
}

fn example_value(option: &Arg) -> String {
    let default = option.get_default_values().first().map(|value| value.to_string_lossy());
    let placeholder = || option.get_value_names().and_then(<[_]>::first).map_or("", |name| name.as_str()).into();
    let value = default.unwrap_or_else(placeholder);
    match (option.get_action(), kind(option)) {
        (ArgAction::Append, _) => "[\"eth0\", \"eth1\"]".into(),
        (_, Kind::Text) => format!("{value:?}"),
        (_, Kind::Number | Kind::Switch) => value.into_owned(),
    }
}

/// Lines that a person likes to read.
fn comment(text: &str) -> String {
    const WIDTH: usize = 100;
    let mut lines = vec![String::from("#")];
    for word in text.split_whitespace() {
        if lines.last().is_some_and(|line| line.len() + 1 + word.len() > WIDTH) {
            lines.push("#".into());
        }
        lines.last_mut().into_iter().for_each(|line| *line += &format!(" {word}"));
    }
    lines.join("\n") + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Engine, Up};
    use proptest::prelude::*;
    use towpath_cm::FlowMode;

    const EXAMPLE: &str = "\
# of a router
ports = [\"eth0\", \"lan0=tap:tap1\"]
engine = \"user\"
cores = \"2-3\"
generic = false
max-flows = 0x1_0000
flows = \"mark=0x10/0xf0\"
";

    /// What is wrong with a file, with its place.
    fn refused(text: impl AsRef<[u8]>) -> (usize, String) {
        let fault = parse(text.as_ref(), &Cli::command()).expect_err("wrong");
        (fault.at, fault.why)
    }

    /// The command line `towpath up WORDS` with a file.
    fn up_with(text: &str, words: &[&str]) -> (Up, String) {
        let settings = parse(text.as_bytes(), &Cli::command()).map_err(|fault| fault.why).expect("a good file");
        let command = with_defaults(Cli::command(), "up", &settings);
        let matches = command.clone().get_matches_from([&["towpath", "up"], words].concat());
        let sources = sources(Path::new("t.toml"), &settings, options(&command, "up"), &matches);
        let crate::cli::Command::Up(up) = cli(&matches).command else { panic!("it was up") };
        (up, sources)
    }

    fn names(up: &Up) -> Vec<&str> {
        up.serve.ports.iter().map(|port| port.name.as_str()).collect()
    }

    #[test]
    fn a_file_has_the_options_of_up() {
        let (up, sources) = up_with(EXAMPLE, &[]);
        assert_eq!(names(&up), ["eth0", "lan0"]);
        assert!(up.serve.engine == Engine::User && !up.serve.generic);
        assert_eq!(up.serve.cores.map(|cores| cores.0), Some(vec![2, 3]));
        assert_eq!((up.serve.max_flows, up.follow.flows), (65_536, FlowMode::Mark { value: 0x10, mask: 0xf0 }));
        for word in ["t.toml", "ports eth0 lan0=tap:tap1 (line 2)", "flows mark=0x10/0xf0 (line 7)"] {
            assert!(sources.contains(word), "{word:?} is missing in {sources}");
        }
    }

    #[test]
    fn the_command_line_goes_before() {
        let (up, sources) =
            up_with("ports = [\"eth0\"]\ngeneric = true\nmax-flows = 7\n", &["--generic=false", "eth1"]);
        assert_eq!(names(&up), ["eth1"]);
        assert!(!up.serve.generic && up.serve.max_flows == 7);
        for word in ["ports eth1 (command line)", "generic false (command line)", "max-flows 7 (line 3)"] {
            assert!(sources.contains(word), "{word:?} is missing in {sources}");
        }
        assert!(sources.contains("engine auto (default)") && !sources.contains("cores"), "{sources}");
    }

    #[test]
    fn an_empty_file_changes_nothing() {
        let (up, _) = up_with("# nothing\n", &[]);
        assert!(up.serve.ports.is_empty() && up.serve.engine == Engine::Auto && up.serve.max_flows == 65_536);
    }

    #[test]
    fn other_commands_take_what_is_theirs() {
        let settings = parse(EXAMPLE.as_bytes(), &Cli::command()).map_err(|fault| fault.why).expect("a good file");
        let matches = with_defaults(Cli::command(), "cm", &settings).get_matches_from(["towpath", "cm"]);
        let crate::cli::Command::Cm(cm) = cli(&matches).command else { panic!("it was cm") };
        assert_eq!(cm.follow.flows, FlowMode::Mark { value: 0x10, mask: 0xf0 });
    }

    #[test]
    fn what_is_wrong_is_named_with_its_place_and_remedy() {
        for (text, at, words) in [
            ("engin = \"xdp\"", 0, &["unknown key \"engin\"", "did you mean engine?"][..]),
            ("\nmax_flows = 7", 1, &["max_flows", "did you mean max-flows?"]),
            ("colour = 7", 0, &["unknown key \"colour\"", "there are ports, engine"]),
            ("config = \"x\"", 0, &["unknown key"]),
            ("[ports]\neth0 = 1", 0, &["wrong value of ports", "a list, as in [\"eth0\", \"eth1\"]"]),
            ("ports = \"eth0\"", 8, &["wrong value of ports", "a list"]),
            ("ports = [\"eth0\", 7]", 17, &["wrong value of ports", "text in quotes"]),
            ("ports = [\"lan0=ring:0\"]", 9, &["wrong value of ports", "no wire \"ring\""]),
            ("ports = [\"\"]", 9, &["a port has the name of an interface"]),
            ("engine = 7", 9, &["wrong value of engine", "text in quotes"]),
            ("engine = \"uesr\"", 9, &["wrong value of engine", "\"uesr\"", "did you mean user?"]),
            ("engine = \"\"", 9, &["wrong value of engine"]),
            ("generic = \"yes\"", 10, &["wrong value of generic", "true or false, without quotes"]),
            ("max-flows = \"7\"", 12, &["wrong value of max-flows", "a number without quotes"]),
            ("max-flows = -1", 12, &["wrong value of max-flows", "-1", "4194303"]),
            ("max-flows = 99999999999999999999", 12, &["wrong value of max-flows"]),
            ("max-flows = 1e9", 12, &["a number without quotes"]),
            ("cores = \"3-2\"", 8, &["wrong value of cores", "ends before it begins"]),
            ("flows = \"some\"", 8, &["wrong value of flows", "established"]),
            ("engine = \"xdp\"\nengine = \"xdp\"", 15, &["this is no TOML", "duplicate key"]),
            ("ports = [\"eth0\"", 15, &["this is no TOML"]),
            ("ports eth0", 6, &["this is no TOML"]),
        ] {
            let (place, why) = refused(text);
            for word in words {
                assert!(why.contains(word), "{text}: {word:?} is missing in {why}");
            }
            assert_eq!(place, at, "{text}: {why}");
            assert!(!why.contains('\n'), "{why}");
        }
    }

    #[test]
    fn the_example_says_the_defaults() {
        let example = example();
        let (as_it_is, _) = up_with(&example, &[]);
        assert!(as_it_is.serve.ports.is_empty());
        for key in options(&Cli::command(), WHOLE).map(key) {
            assert_eq!(example.lines().filter(|line| line.starts_with(&format!("#{key} = "))).count(), 1, "{key}");
        }
        let defaults: String = ["engine", "generic", "shadow", "max-flows", "flows"]
            .iter()
            .flat_map(|key| example.lines().filter(move |line| line.starts_with(&format!("#{key} = "))))
            .map(|line| format!("{}\n", &line[1..]))
            .collect();
        let (up, sources) = up_with(&defaults, &[]);
        assert!(up.serve.engine == Engine::Auto && !up.serve.generic && !up.serve.shadow, "{defaults}");
        assert_eq!((up.serve.max_flows, up.follow.flows), (65_536, FlowMode::Flowtable));
        assert!(!sources.contains("default"), "{sources}");
    }

    #[test]
    fn what_is_no_text_is_refused() {
        assert_eq!(refused(b"# \xff\n").0, 2);
        assert!(refused(b"\x7fELF\x02\x01\x01\0").1.contains("no TOML"));
        assert!(refused(vec![b'\n'; LARGEST as usize + 1]).1.contains("more than"));
    }

    #[test]
    fn a_place_has_a_line_and_a_column() {
        let path = std::env::temp_dir().join(format!("towpath-config-{}.toml", std::process::id()));
        std::fs::write(&path, "# ä\nports = [\"ä\", 7]\n").unwrap();
        let error = read(&path, &Cli::command()).expect_err("wrong");
        std::fs::remove_file(&path).unwrap();
        assert!(error.to_string().starts_with(&format!("{}:2:15: wrong value", path.display())), "{error}");
    }

    proptest! {
        #[test]
        fn any_bytes_have_an_answer(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Err(fault) = parse(&bytes, &Cli::command()) {
                prop_assert!(fault.at <= bytes.len() && !fault.why.is_empty());
            }
        }

        #[test]
        fn a_spoilt_file_has_an_answer(at in 0..EXAMPLE.len(), length in 0..8_usize, new in "[\\[\\]{}=\"'#.\n0-9a-z\\\\-]{0,4}") {
            let mut text = EXAMPLE.to_owned();
            text.replace_range(at..(at + length).min(EXAMPLE.len()), &new);
            if let Err(fault) = parse(text.as_bytes(), &Cli::command()) {
                prop_assert!(text.is_char_boundary(fault.at) && !fault.why.is_empty());
            }
        }
    }
}
