//! Between the kept corpora and folders with a file for each input, as libFuzzer wants them:
//! `corpus unpack TARGET FOLDER` writes seeds and what is kept, `corpus pack TARGET FOLDER` keeps what is no seed.

use std::fs;
use std::path::Path;
use std::process::ExitCode;
use towpath_fuzz::{Target, target};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [verb, name, folder] = &arguments[..] else { return failure("unpack or pack, a target, and a folder") };
    let Some(target) = target(name) else { return failure(&format!("there is no target {name}")) };
    let done = match verb.as_str() {
        "unpack" => unpack(target, Path::new(folder)),
        "pack" => pack(target, Path::new(folder)),
        _ => return failure(&format!("unpack or pack, not {verb}")),
    };
    done.map_or_else(|error| failure(&format!("{folder}: {error}")), |()| ExitCode::SUCCESS)
}

fn failure(why: &str) -> ExitCode {
    eprintln!("corpus: {why}");
    ExitCode::FAILURE
}

fn unpack(target: &Target, folder: &Path) -> std::io::Result<()> {
    fs::create_dir_all(folder)?;
    let inputs = (target.seeds)().into_iter().chain(target.corpus());
    inputs.enumerate().try_for_each(|(number, input)| fs::write(folder.join(format!("{number:06}")), input))
}

fn pack(target: &Target, folder: &Path) -> std::io::Result<()> {
    let seeds = (target.seeds)();
    let mut inputs = Vec::new();
    for entry in fs::read_dir(folder)? {
        let input = fs::read(entry?.path())?;
        if !input.is_empty() && !seeds.contains(&input) {
            inputs.push(input);
        }
    }
    // The shortest first; each once.
    inputs.sort_by(|a, b| (a.len(), a).cmp(&(b.len(), b)));
    inputs.dedup();
    let line =
        |input: &Vec<u8>| input.iter().map(|byte| format!("{byte:02x}")).chain(["\n".into()]).collect::<String>();
    fs::write(target.corpus_file(), inputs.iter().map(line).collect::<String>())
}
