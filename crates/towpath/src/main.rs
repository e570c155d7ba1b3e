//! `towpath`: the command, and the daemon it runs in the foreground.

mod answer;
mod captures;
mod check;
mod cli;
mod clients;
mod control;
mod daemon;
mod doctor;
mod explain;
mod flows;
mod follow;
mod frame;
mod instance;
mod interfaces;
mod metrics;
mod nat;
mod notify;
mod openmetrics;
mod ports;
mod read;
mod remote;
mod report;
mod sentry;
mod signals;
mod source;
mod text;
mod top;
mod wires;
mod words;
mod workers;

use clap::{CommandFactory, Parser, error::ErrorKind};
use cli::{Cli, Command, Engine, Fpm, Serve, Up};
use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = Cli::parse();
    check_usage(&cli);
    start_log(cli.verbose);
    match run(cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("towpath: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// What clap's definitions cannot say.
fn check_usage(cli: &Cli) {
    let fail = |text: &str| Cli::command().error(ErrorKind::ValueValidation, text).exit();
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
        Some(Serve { ports, engine, .. }) => {
            let of_wire = |port: &&wires::PortArgument| port.wire.is_some();
            if let Some(port) = ports.iter().find(of_wire).filter(|_| *engine != Engine::User) {
                fail(&format!("{}=… has a wire of its own: that goes with --engine user", port.name))
            }
            let name = |place: &usize| &ports[*place].name;
            let twice = (1..ports.len()).find(|at| ports[..*at].iter().any(|port| port.name == *name(at)));
            if let Some(at) = twice.filter(|_| ports.iter().any(|port| port.wire.is_some())) {
                fail(&format!("port {} was named twice", name(&at)))
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

fn start_log(verbose: u8) {
    // What the BPF loader has to say of BTF that old kernels lack concerns nobody.
    let default = ["info,aya=error,aya_obj=error", "debug,aya=info,aya_obj=info", "trace"][usize::from(verbose).min(2)];
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| default.into());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .init();
}

fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Status(output) => read::status(output),
        Command::Show(what) => read::show(&what),
        Command::Explain(explain) => read::explain(&explain),
        Command::Top(top) => top::run(&top),
        Command::Nat(what) => nat::run(&what),
        Command::Check(output) => check::run(output),
        Command::Doctor(doctor) => doctor::run(&doctor),
        Command::Up(up) => daemon::run(&up.serve, daemon::Origin::InProcess(up.follow.flows)),
        Command::Down => daemon::down(),
        Command::Fpm(fpm) => daemon::run(&fpm.serve, daemon::Origin::Socket(fpm.socket)),
        Command::Cm(cm) => remote::run_cm(&cm),
    }
}
