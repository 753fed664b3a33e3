//! `cargo xtask …`: builds and starts the `dragon` binary, and runs everything CI checks.
//!
//! It links no crate of this workspace, so it compiles in seconds. Every command it does not know itself is handed to
//! `dragon`, built in release.

mod fixtures;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};

const HELP: &str = "\
cargo xtask <command> [arguments]

Checks and measurements:
  test                 format, clippy, tests, doc links, crate edges, fixtures: everything CI checks
  bench --peers        our layers and PyTorch's, timed in turn (makes a Python environment)
  bench --peers metrics
                       our metrics and fadtk's, kadtk's and vendi-score's, the same way
  bench --peers audio  reading an hour of MP3 and FLAC, and what fadtk does, the same way
  bench --peers models
                       published models at their published sizes and their reference implementations: time and peak
                       memory, with seeded random weights (up to 14 GB of disk)
  parity clap|t5|stable_audio|gradients|codecs|musicgen
                       our models and their reference implementations at the published sizes, with seeded random
                       weights in the published layouts: errors per stage (makes a Python environment; --only NAME)
  fixtures [--check]   list the fixtures with size and hash; --check compares with fixtures/MANIFEST.tsv,
                       --write renews it

Everything else is a command of `dragon`, built in release and started with the same arguments:
  data, pretrain, generate, embed, stats, score, finetune, eval, …  `cargo xtask help` lists them
  with --device cuda it is built with CUDA, which takes the CUDA toolkit (nvcc)";

fn main() -> ExitCode {
    match run() {
        Ok(code) => code,
        Err(err) => {
            eprintln!("error: {err:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<ExitCode> {
    let root = root();
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.first().map(String::as_str) {
        None | Some("--help" | "-h") => println!("{HELP}"),
        Some("help") => {
            println!("{HELP}\n");
            return dragon(&root, &["--help".into()]);
        }
        Some("test") => test(&root)?,
        Some("fixtures") => fixtures::run(&root, &args[1..])?,
        Some("bench") if args.iter().any(|a| a == "--peers") => peers(&root, &args[1..])?,
        Some("parity") => parity(&root, &args[1..])?,
        Some(_) => return dragon(&root, &args),
    }
    Ok(ExitCode::SUCCESS)
}

/// The workspace's folder: the parent of this crate's.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies inside the workspace").to_owned()
}

fn cargo(root: &Path) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root);
    command
}

/// Runs a step to its end; its output goes straight to the terminal.
fn step(name: &str, command: &mut Command) -> Result<()> {
    eprintln!("== {name}");
    let start = std::time::Instant::now();
    let status = command.status().with_context(|| format!("cannot start the step `{name}`"))?;
    if !status.success() {
        bail!("the step `{name}` failed ({status})");
    }
    eprintln!("== {name}: passed in {:.0} s", start.elapsed().as_secs_f64());
    Ok(())
}

fn test(root: &Path) -> Result<()> {
    step("format", cargo(root).args(["fmt", "--all", "--check"]))?;
    step("fixtures", Command::new(std::env::current_exe()?).args(["fixtures", "--check"]))?;
    step(
        "clippy",
        cargo(root).args([
            "clippy",
            "--release",
            "--workspace",
            "--all-targets",
            "--locked",
            "--",
            "-D",
            "warnings",
        ]),
    )?;
    step(
        "doc links",
        cargo(root).env("RUSTDOCFLAGS", "-D warnings").args([
            "doc",
            "--release",
            "--workspace",
            "--no-deps",
            "--locked",
        ]),
    )?;
    step("tests", cargo(root).args(["test", "--release", "--workspace", "--locked"]))
}

/// Builds `dragon`, with CUDA if the arguments ask for it, and hands over to it; its exit code is ours.
fn dragon(root: &Path, args: &[String]) -> Result<ExitCode> {
    let cuda = wants_cuda(args);
    let mut build = cargo(root);
    build.args(["build", "--release", "--quiet", "--package", "dragon-cli"]);
    if cuda {
        build.args(["--features", "cuda"]);
    }
    if !build.status().context("cannot start cargo")?.success() {
        if cuda {
            bail!(
                "`dragon` does not build with CUDA\n\
                 hint: it needs the CUDA toolkit: nvcc on the PATH, CUDA_HOME; without a GPU here, also \
                 CUDA_COMPUTE_CAP=80 (or what the GPU has)"
            );
        }
        bail!("`dragon` does not build");
    }
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
    let binary = target.join("release").join("dragon");
    if cuda {
        check_that_it_starts(&binary)?;
    }
    let mut command = Command::new(&binary);
    command.args(args);
    #[cfg(unix)]
    {
        // Replacing this process passes on signals (Ctrl-C stops `dragon` cleanly) and the exit code.
        use std::os::unix::process::CommandExt;
        Err(command.exec()).with_context(|| format!("cannot start {}", binary.display()))
    }
    #[cfg(not(unix))]
    {
        let status = command.status().with_context(|| format!("cannot start {}", binary.display()))?;
        Ok(ExitCode::from(status.code().and_then(|c| u8::try_from(c).ok()).unwrap_or(1)))
    }
}

/// Whether the arguments ask for a GPU.
fn wants_cuda(args: &[String]) -> bool {
    let is_gpu = |device: &str| device == "cuda" || device.starts_with("cuda:");
    let options = args.split(|arg| arg == "--").next().unwrap_or_default();
    options.iter().any(|arg| arg.strip_prefix("--device=").is_some_and(is_gpu))
        || options.windows(2).any(|pair| pair[0] == "--device" && is_gpu(&pair[1]))
}

/// Built with CUDA, `dragon` is linked with NVIDIA's libraries: where one is missing, the system refuses to load it
/// before it can say anything itself.
fn check_that_it_starts(binary: &Path) -> Result<()> {
    let output = Command::new(binary)
        .arg("--version")
        .output()
        .with_context(|| format!("cannot start {}", binary.display()))?;
    if !output.status.success() {
        bail!(
            "`dragon` was built with CUDA, but does not start on this machine\n  {}\n\
             hint: it needs NVIDIA's driver (libcuda.so.1) and, in the loader's path (LD_LIBRARY_PATH), the libraries \
             of the CUDA toolkit; leave --device out for the CPU",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}

/// Times us and others in turn: layers against PyTorch, `metrics` and `audio` against the tools they replace, `models`
/// against their references. Builds our side, then leaves the rounds to the script.
fn peers(root: &Path, args: &[String]) -> Result<()> {
    let has = |what: &str| args.iter().any(|a| a == what);
    let (example, packages) = match () {
        () if has("metrics") => ("peers_metrics", &["--package", "dragon-metrics"][..]),
        () if has("audio") => ("peers_audio", &["--workspace"][..]),
        () if has("models") => ("peers_models", &["--workspace"][..]),
        () => ("peers", &["--workspace"][..]),
    };
    step("build", cargo(root).args(["build", "--release", "--example", example]).args(packages))?;
    let script = root.join(format!("xtask/bench/{example}.py"));
    let rest = args.iter().filter(|a| !["--peers", "metrics", "audio", "models"].contains(&a.as_str()));
    step("peers", Command::new("python3").arg(script).args(rest).current_dir(root))
}

/// Compares a model with its reference implementation: builds our side, then leaves the rest to the script.
fn parity(root: &Path, args: &[String]) -> Result<()> {
    const MODELS: [&str; 6] = ["clap", "t5", "stable_audio", "gradients", "codecs", "musicgen"];
    let Some(model) = args.first().filter(|model| MODELS.contains(&model.as_str())) else {
        bail!("`parity` takes {}\nhint: cargo xtask parity clap --only music", MODELS.join(", "));
    };
    let example = format!("parity_{model}");
    let build = ["build", "--release", "--workspace", "--example", &example];
    step("build", cargo(root).args(build))?;
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
    let binary = target.join("release").join("examples").join(&example);
    let script = root.join("xtask/parity/parity.py");
    step(
        "parity",
        Command::new("python3").arg(script).args(args).arg("--binary").arg(binary).current_dir(root),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dragon_is_built_with_cuda_only_for_a_gpu() {
        let wants = |args: &str| wants_cuda(&args.split(' ').map(str::to_owned).collect::<Vec<_>>());
        for args in
            ["finetune --device cuda", "bench --device=cuda --rounds 1", "generate jig --device cuda:1"]
        {
            assert!(wants(args), "{args}");
        }
        for args in ["finetune", "finetune --device cpu", "generate cuda", "generate -- --device cuda"] {
            assert!(!wants(args), "{args}");
        }
    }
}
