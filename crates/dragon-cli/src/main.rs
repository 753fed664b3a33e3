//! The `dragon` command: arguments, presets, messages and exit codes. All work is done in the crates below.
//!
//! Exit codes: 0 done, 1 something the user can fix, 2 a bug of ours.

mod commands;
mod settings;

use std::io::IsTerminal;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::Parser;

/// Candle allocates a fresh buffer for every operation; glibc would give each back to the kernel.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// DRAGON: fine-tunes text-to-music diffusion models towards a reward, and measures them
#[derive(Parser)]
#[command(name = "dragon", version, propagate_version = true, max_term_width = 110)]
struct Cli {
    /// Say more on stderr (-v: debug messages)
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
    #[command(subcommand)]
    command: commands::Command,
}

fn main() -> ExitCode {
    if std::env::var_os("CANDLE_NUM_THREADS").is_none() {
        // Our kernels bring their own threads; candle's pool for element-wise work only spins beside them.
        // SAFETY: no other thread exists yet that could read the environment.
        unsafe { std::env::set_var("CANDLE_NUM_THREADS", "1") };
    }
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(err) => {
            let _ = err.print();
            return if err.use_stderr() { ExitCode::from(1) } else { ExitCode::SUCCESS };
        }
    };
    let level = if cli.verbose > 0 { "debug" } else { "info" };
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none())
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env()
                .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(level)),
        )
        .with_target(false)
        .without_time()
        .init();

    let stop = Arc::new(AtomicBool::new(false));
    let flag = stop.clone();
    // A failure here means a handler exists already; then Ctrl-C ends the process at once, as without it.
    let _ = ctrlc::set_handler(move || {
        if flag.swap(true, Ordering::SeqCst) {
            std::process::exit(130);
        }
        eprintln!("stopping: the step in progress is finished and saved (Ctrl-C again ends at once)");
    });

    match std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| cli.command.run(&stop))) {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(err)) => {
            eprintln!("error: {}", message(&err));
            ExitCode::from(1)
        }
        Err(_) => {
            eprintln!("error: this is a bug in dragon; the lines above say where");
            ExitCode::from(2)
        }
    }
}

/// The chain of causes, one a line, without repeating what a cause already says.
fn message(err: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in err.chain() {
        let line = cause.to_string();
        if text.contains(&line) {
            continue;
        }
        if !text.is_empty() {
            text.push_str("\n  ");
        }
        text.push_str(&line);
    }
    text
}
