//! `towpath`: the command, and the daemon it runs in the foreground.

mod answer;
mod captures;
mod check;
mod cli;
mod clients;
mod config;
mod control;
mod daemon;
mod doctor;
mod explain;
mod filter;
mod flows;
mod follow;
mod frame;
mod generate;
mod instance;
mod interfaces;
mod keeper;
mod link;
mod log;
mod lookout;
mod metrics;
mod nat;
mod notify;
mod openmetrics;
mod ports;
mod read;
mod remote;
mod report;
mod resyncs;
mod sentry;
mod signals;
mod source;
mod text;
mod top;
mod trace;
mod twins;
mod wires;
mod words;
mod workers;

use clap::{CommandFactory, error::ErrorKind};
use cli::{Cli, Command, Engine, Fpm, Serve, Up};
use daemon::Ended;
use std::process::ExitCode;

fn main() -> ExitCode {
    let (cli, sources) = match config::command_line() {
        Ok(parsed) => parsed,
        Err(error) => {
            log::failure(error);
            return ExitCode::from(WRONG_USAGE);
        }
    };
    check_usage(&cli, sources.as_deref());
    log::start(cli.verbose);
    if let Some(sources) = sources {
        tracing::info!("{sources}");
    }
    match run(cli.command) {
        Ok(Ended::Done) => ExitCode::SUCCESS,
        Ok(Ended::Left) => ExitCode::from(LEFT),
        Err(error) => {
            log::failure(format_args!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}

/// As clap ends for wrong usage.
const WRONG_USAGE: u8 = 2;
/// Of a daemon whose work another one is to go on with: EX_TEMPFAIL (sysexits.h), which says to try again.
const LEFT: u8 = 75;

/// What clap's definitions cannot say. `sources` tells which settings are a file's.
fn check_usage(cli: &Cli, sources: Option<&str>) {
    let fail = |text: &str| {
        let text = sources.map_or(text.into(), |sources| format!("{text}\n{sources}"));
        Cli::command().error(ErrorKind::ValueValidation, text).exit()
    };
    let serve = match &cli.command {
        Command::Up(Up { serve, .. }) | Command::Fpm(Fpm { serve, .. }) => Some(serve),
        _ => None,
    };
    match serve {
        Some(Serve { cores: Some(_), engine: Engine::Xdp | Engine::Auto, .. }) => {
            fail("--cores is for workers of their own: it goes with --engine user")
        }
        Some(Serve { generic: true, engine: Engine::User, .. }) => {
            fail("--engine user needs native XDP, so --generic does not go with it")
        }
        Some(Serve { shadow: true, engine: Engine::User, .. }) => {
            fail("--shadow is the XDP program's, which has all packets before Linux: it does not go with --engine user")
        }
        Some(Serve { ports, engine, detach_after, .. }) => {
            let of_wire = |port: &&wires::PortArgument| port.wire.is_some();
            if let Some(port) = ports.iter().find(of_wire).filter(|_| *engine != Engine::User) {
                fail(&format!("{}=… has a wire of its own: that goes with --engine user", port.name))
            }
            let name = |place: &usize| &ports[*place].name;
            let twice = (1..ports.len()).find(|at| ports[..*at].iter().any(|port| port.name == *name(at)));
            if let Some(at) = twice.filter(|_| ports.iter().any(|port| port.wire.is_some())) {
                fail(&format!("port {} was named twice", name(&at)))
            }
            if detach_after.is_some() && !ports.is_empty() && ports.iter().all(|port| port.wire.is_some()) {
                fail(
                    "--detach-after cannot help where all ports have wires: those are the workers', and Linux receives nothing \
                     by them once towpath has died; leave it out",
                )
            }
        }
        None => {}
    }
    let Command::Explain(explain) = &cli.command else { return };
    if explain.source.is_ipv4() != explain.destination.is_ipv4() {
        fail("source and destination must be of the same family");
    }
    match explain.ingress.as_slice() {
        [] => {}
        [word, _] if word == "in" => {}
        _ => fail("after the destination only `in PORT` may follow"),
    }
}

fn run(command: Command) -> anyhow::Result<Ended> {
    match command {
        Command::Up(up) => return daemon::run(&up.serve, daemon::Origin::InProcess(up.follow.flows)),
        Command::Fpm(fpm) => return daemon::run(&fpm.serve, fpm.origin()),
        Command::Status(output) => read::status(output),
        Command::Show(what) => read::show(&what),
        Command::Explain(explain) => read::explain(&explain),
        Command::Top(top) => top::run(&top),
        Command::Trace(wanted) => trace::run(&wanted),
        Command::Nat(what) => nat::run(&what),
        Command::Filter(what) => filter::run(&what),
        Command::Check(output) => check::run(output),
        Command::Doctor(doctor) => doctor::run(&doctor),
        Command::Down => daemon::down(),
        Command::Leave => daemon::leave(),
        Command::Cm(cm) => remote::run_cm(&cm),
        Command::Generate { folder } => generate::run(&folder),
    }?;
    Ok(Ended::Done)
}
