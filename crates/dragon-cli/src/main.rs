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

/// Asks the allocator never to give freed memory back before the end: a training step needs the same memory as the one
/// before, and the kernel would clear every page of it anew.
fn keep_freed_memory() {
    /// `mi_option_purge_delay` of mimalloc 2 and 3, which the bindings do not name; in milliseconds, -1: never.
    const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;
    // SAFETY: sets a number; unknown options are ignored.
    unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY, -1) };
}

/// DRAGON: fine-tunes text-to-music diffusion models towards a reward, and measures them
#[derive(Parser)]
#[command(name = "dragon", version, propagate_version = true, term_width = 110)]
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
    keep_freed_memory();
    // This thread is one of the pool: it works too, instead of waking two others for every operation and waiting.
    // The pool is made here for the first time, so this cannot fail; if it did, the usual pool would do.
    let _ = rayon::ThreadPoolBuilder::new().use_current_thread().build_global();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(err) => {
            let _ = err.print();
            return if err.use_stderr() { ExitCode::from(1) } else { ExitCode::SUCCESS };
        }
    };
    // The decoder tells of every stream it opens.
    let level = if cli.verbose > 0 { "debug" } else { "info,symphonia=warn" };
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
            ExitCode::from(err.downcast_ref::<dragon_trainer::Error>().map_or(1, |err| err.exit_code()))
        }
        Err(_) => {
            eprintln!("error: this is a bug in dragon; the lines above say where");
            ExitCode::from(2)
        }
    }
}

/// The chain of causes, one a line, without repeating what a cause already says; hints come last, at the margin.
fn message(err: &anyhow::Error) -> String {
    let mut lines: Vec<String> = Vec::new();
    let mut hints: Vec<String> = Vec::new();
    for (depth, cause) in err.chain().enumerate() {
        let cause = cause.to_string();
        if depth > 0 && lines.iter().any(|line| line.contains(cause.lines().next().unwrap_or_default())) {
            continue;
        }
        for line in cause.lines() {
            if line.trim_start().starts_with("hint:") {
                hints.push(line.trim_start().to_owned());
            } else if depth > 0 {
                lines.push(format!("  {line}"));
            } else {
                lines.push(line.to_owned());
            }
        }
    }
    // What the system says about a full disk or a limit comes through crates that know nothing of hints.
    let full = |code: &str| lines.iter().any(|line| line.contains(code));
    if hints.is_empty() && (full("(os error 28)") || full("(os error 122)") || full("(os error 27)")) {
        hints.push("hint: make room, or lift the limit on disk space or file size; what was saved before is still whole".into());
    }
    if hints.is_empty() && full("(os error 13)") {
        hints.push("hint: check the permissions, or name another place".into());
    }
    hints.dedup();
    lines.extend(hints);
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_names_each_cause_once_and_ends_with_the_hint() {
        let inner =
            anyhow::anyhow!("`x.wav` is empty: expected audio, found 0 bytes\n  hint: fetch it again");
        let err = inner.context("cannot embed");
        assert_eq!(
            message(&err),
            "cannot embed\n  `x.wav` is empty: expected audio, found 0 bytes\nhint: fetch it again"
        );
        let again = err.context("cannot embed");
        assert_eq!(message(&again).matches("cannot embed").count(), 1);
    }

    #[test]
    fn the_arguments_make_sense() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }
}
