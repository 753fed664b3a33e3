//! `dragon reproduce`: fine-tunings one after the other, and their results in the layouts of the paper's tables.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result};
use dragon_trainer::eval::{Summary, appendix_tables, win_rates};
use dragon_trainer::run::write_atomic;
use toml::Table;

use super::{ConfigArgs, RunArgs, finetune};
use crate::settings;

/// Fine-tune by several presets and print their win rates over the base as the paper's Table 1 does
///
/// OUT/tables.md also has them in the layouts of its Tables 6 to 10, with the values. Each preset has its folder
/// OUT/PRESET. A preset that is done is not run again, one that was stopped goes on, and the tables hold all that is done in
/// OUT.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  dragon reproduce                                   all presets for the shipped model
  dragon reproduce per-song-fad vendi --set run.steps=10 --out runs/short
  dragon reproduce per-song-fad --seed 2 --out runs/seed-2")]
pub struct Args {
    /// Presets of presets/finetune; if none is named, all that tune the shipped model
    presets: Vec<String>,
    /// Change one key of every preset's config (docs/config.md lists them); may be given several times
    #[arg(long = "set", value_name = "KEY=VALUE")]
    overrides: Vec<String>,
    /// Seed of everything random; short for --set seed=N
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Where tensors live: `cpu` or `cuda` (`cuda:1` for the second GPU)
    #[arg(long, default_value = "cpu")]
    device: String,
    /// Folder of the runs, of tables.md and tables.json
    #[arg(long, value_name = "DIR", default_value = "runs/reproduce")]
    out: PathBuf,
}

/// Runs the command.
pub fn run(args: Args, stop: &Arc<AtomicBool>) -> Result<()> {
    let config = ConfigArgs { config: None, overrides: args.overrides, seed: args.seed };
    let presets = match args.presets.is_empty() {
        true => shipped_presets()?,
        false => args.presets,
    };
    // A mistake in the last preset should not wait for the runs before it.
    for preset in &presets {
        finetune::check(preset, &config)?;
    }
    let run = RunArgs { resume: true, device: args.device };
    for preset in &presets {
        let out = args.out.join(preset);
        eprintln!("{preset}: {}", out.display());
        if finetune::run_preset(preset, &config, &run, &out, stop)?.is_none() {
            return Ok(());
        }
        write(&args.out, &done(&args.out)?)?;
    }
    let done = done(&args.out)?;
    print!("{}", win_rates(&summaries(&done)).to_text());
    println!("{}", args.out.join("tables.md").display());
    Ok(())
}

/// The presets that tune the shipped model.
fn shipped_presets() -> Result<Vec<String>> {
    let none = ConfigArgs { config: None, overrides: Vec::new(), seed: None };
    let shipped = settings::path("builtin:tiny");
    let mut presets = Vec::new();
    for preset in settings::PRESETS.iter().filter_map(|(name, _)| name.strip_prefix("finetune/")) {
        if finetune::config(preset, &none)?.bundle == shipped {
            presets.push(preset.to_owned());
        }
    }
    Ok(presets)
}

/// A fine-tuning that is measured.
struct Done {
    name: String,
    summary: Summary,
    /// The table `dragon` of its `run.toml`: command and commit.
    made: Table,
    seed: Option<i64>,
}

/// Everything in `out` that is measured, in the order of names.
fn done(out: &Path) -> Result<Vec<Done>> {
    let mut all = Vec::new();
    for folder in std::fs::read_dir(out).with_context(|| format!("cannot read `{}`", out.display()))? {
        let folder = folder?.path();
        let Ok(report) = std::fs::read(folder.join("report.json")) else { continue };
        let Ok(summary) = serde_json::from_slice(&report) else { continue };
        let Ok(run) = std::fs::read_to_string(folder.join("run.toml")) else { continue };
        let run: Table =
            run.parse().with_context(|| format!("`{}` is broken", folder.join("run.toml").display()))?;
        let made = run.get("dragon").and_then(|made| made.as_table()).cloned().unwrap_or_default();
        let seed = run.get("config").and_then(|config| config.get("seed")?.as_integer());
        let name = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
        all.push(Done { name, summary, made, seed });
    }
    all.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(all)
}

fn summaries(done: &[Done]) -> Vec<(String, Summary)> {
    done.iter().map(|run| (run.name.clone(), run.summary.clone())).collect()
}

/// Writes what is done so far.
fn write(out: &Path, done: &[Done]) -> Result<()> {
    let all = summaries(done);
    let mut text = String::new();
    for table in std::iter::once(win_rates(&all)).chain(appendix_tables(&all)) {
        text += &format!("## {}\n\n", table.title);
        if !table.note.is_empty() {
            text += &format!("{}\n\n", table.note);
        }
        text += &table.to_markdown();
        text.push('\n');
    }
    for Done { name, summary, made, seed } in done {
        let made = |key: &str| made.get(key).and_then(|value| value.as_str()).unwrap_or("unknown");
        let seed = seed.map_or("unknown".to_owned(), |seed| seed.to_string());
        let (command, commit, table) = (made("command"), made("commit"), summary.to_markdown());
        text += &format!("\n## {name}\n\n`{command}`, seed {seed}, commit {commit}.\n\n{table}");
    }
    write_atomic(&out.join("tables.md"), text.as_bytes())?;
    let json: Vec<_> = done
        .iter()
        .map(|run| {
            serde_json::json!({
                "preset": run.name, "made": run.made, "seed": run.seed,
                "metrics": run.summary.metrics, "warnings": run.summary.warnings,
            })
        })
        .collect();
    Ok(write_atomic(&out.join("tables.json"), &serde_json::to_vec_pretty(&json)?)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_names_all_presets_run_that_need_no_download() {
        let presets = shipped_presets().unwrap();
        for preset in ["per-song-fad", "clap-score", "per-song-fad-text", "dataset-fad", "vendi"] {
            assert!(presets.iter().any(|name| name == preset), "{preset}");
        }
        assert!(!presets.contains(&"stable-audio".to_owned()));
    }
}
