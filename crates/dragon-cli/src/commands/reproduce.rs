//! `dragon reproduce`: fine-tunings one after the other, and their results in the layouts of the paper's tables.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::Result;
use dragon_trainer::eval::{Summary, appendix_tables, win_rates};
use dragon_trainer::run::write_atomic;

use super::{ConfigArgs, RunArgs, finetune};
use crate::settings;

/// Fine-tune by several presets and print their win rates over the base as the paper's Table 1 does
///
/// OUT/tables.md also has them in the layouts of its Tables 6 to 10, with the values. Each preset has its folder
/// OUT/PRESET. A preset that is done is not run again, one that was stopped goes on.
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
    let mut done: Vec<(String, Summary)> = Vec::new();
    for preset in &presets {
        let out = args.out.join(preset);
        eprintln!("{preset}: {}", out.display());
        let summary = finetune::run_preset(preset, &config, &run, &out, stop)?;
        let Some(summary) = summary else { return Ok(()) };
        done.push((preset.clone(), summary));
        write(&args.out, &done)?;
    }
    print!("{}", win_rates(&done).to_text());
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

/// Writes what is done so far.
fn write(out: &Path, done: &[(String, Summary)]) -> Result<()> {
    let mut text = String::new();
    for table in std::iter::once(win_rates(done)).chain(appendix_tables(done)) {
        text += &format!("## {}\n\n", table.title);
        if !table.note.is_empty() {
            text += &format!("{}\n\n", table.note);
        }
        text += &table.to_markdown();
        text.push('\n');
    }
    for (preset, summary) in done {
        text += &format!("\n## {preset}\n\n{}", summary.to_markdown());
    }
    write_atomic(&out.join("tables.md"), text.as_bytes())?;
    let json: Vec<_> = done
        .iter()
        .map(|(preset, summary)| serde_json::json!({ "preset": preset, "metrics": summary.metrics }))
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
