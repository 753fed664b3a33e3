//! The report of an evaluation, and the files it is written to.

use std::fs;
use std::path::Path;

use dragon_audio::SampleFormat;

use super::summary::{Summary, number};
use super::systems::System;
use super::tables::appendix_tables;
use crate::error::{Error, Result};
use crate::generate::slug;
use crate::report;
use crate::run::{RunContext, write_atomic};

/// The report without the facts of its command.
pub(super) fn page(summary: &Summary, systems: &[System], title: &str) -> report::Report {
    let target = summary.target();
    let (head, rows) = summary.cells();
    let won = target.song_win_rate.as_ref().map_or(String::new(), |w| {
        format!(
            " It wins {} of {} songs ({:.1} %, 95 % interval {:.1} to {:.1} %).",
            w.wins,
            w.n,
            100.0 * w.rate,
            100.0 * w.lower,
            100.0 * w.upper
        )
    });
    let lead = format!(
        "{}: {} for {}, {} for {}; {} is better.{won}",
        target.name,
        number(target.base),
        summary.base,
        number(target.tuned),
        summary.tuned,
        if target.lower_is_better { "lower" } else { "higher" }
    );
    let lead = summary.warnings.iter().fold(lead, |lead, warning| format!("{lead} Warning: {warning}."));
    let charts = summary
        .metrics
        .iter()
        .filter_map(|m| match (&m.base_songs, &m.tuned_songs) {
            (Some(base), Some(tuned)) => Some(report::Chart::Histogram {
                title: format!("{} of the songs", m.name),
                x_label: m.name.clone(),
                series: vec![(summary.base.clone(), base.clone()), (summary.tuned.clone(), tuned.clone())],
            }),
            _ => None,
        })
        .collect();
    let n = systems.iter().map(|s| s.examples.len()).min().unwrap_or(0);
    let note = |songs: &Option<Vec<f64>>, i: usize| {
        songs
            .as_ref()
            .and_then(|s| s.get(i))
            .map_or(String::new(), |v| format!("{} {}", target.name, number(*v)))
    };
    let take = |s: usize, i: usize, label: &str, note: String| report::Take {
        label: label.to_owned(),
        samples: systems[s].examples[i].samples.clone(),
        sample_rate_hz: systems[s].examples[i].sample_rate_hz,
        note,
    };
    let songs = (0..n)
        .map(|i| {
            let song = &summary.songs[i];
            report::Song {
                caption: song.caption.clone().unwrap_or_else(|| song.id.clone()),
                takes: vec![
                    take(0, i, &summary.base, note(&target.base_songs, i)),
                    take(1, i, &summary.tuned, note(&target.tuned_songs, i)),
                ],
            }
        })
        .collect();
    let table = report::Table {
        title: "Metrics".into(),
        note: "Songs won: prompts on which the tuned model is better, with a Clopper-Pearson interval. Sets won, and the interval \
               of the difference: random subsets, drawn with replacement, the same for both. The last rows are no reward: \
               they show hacking."
            .into(),
        head,
        rows,
    };
    let appendix = appendix_tables(&[(summary.tuned.clone(), summary.clone())]);
    report::Report {
        title: title.into(),
        lead,
        facts: Vec::new(),
        tables: vec![table],
        charts,
        songs,
        appendix,
    }
}

/// The log of the run that made a tuned model: a line a step.
pub(super) fn read_log(path: &Path) -> Result<Vec<serde_json::Value>> {
    let text = fs::read_to_string(path).map_err(Error::io("read", path))?;
    Ok(text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect())
}

/// The warnings of a run, each with its step as a fact of the page.
pub(super) fn training_warnings(log: &[serde_json::Value]) -> Vec<(String, String)> {
    let of_line = |line: &serde_json::Value| {
        let step = line.get("step")?.as_u64()? + 1;
        let warnings = line.get("warnings")?.as_array()?.iter();
        let fact = |text: &str| (format!("warning at step {step}"), text.to_owned());
        Some(warnings.filter_map(|text| text.as_str().map(fact)).collect::<Vec<_>>())
    };
    log.iter().filter_map(of_line).flatten().collect()
}

/// Curves of the run that made a tuned model.
pub(super) fn training_charts(lines: &[serde_json::Value]) -> Vec<report::Chart> {
    let series = |name: &str, label: &str| report::Series {
        name: label.to_owned(),
        points: lines
            .iter()
            .filter_map(|line| Some((line.get("step")?.as_f64()?, line.get(name)?.as_f64()?)))
            .collect(),
    };
    let chart = |title: &str, y_label: &str, log_y: bool, names: &[(&str, &str)]| {
        let series: Vec<report::Series> =
            names.iter().map(|(name, label)| series(name, label)).filter(|s| !s.points.is_empty()).collect();
        (!series.is_empty()).then(|| report::Chart::Lines {
            title: title.into(),
            x_label: "step".into(),
            y_label: y_label.into(),
            series,
            log_y,
        })
    };
    let charts = [
        chart(
            "Reward while learning",
            "reward",
            false,
            &[("reward", "policy"), ("reward_plus", "D+"), ("reward_minus", "D-")],
        ),
        chart(
            "Reward on validation prompts",
            "reward",
            false,
            &[("valid/reward", "tuned"), ("valid/reward_base", "base")],
        ),
        chart("Loss", "loss", false, &[("loss", "loss")]),
        chart("Implicit accuracy", "share", false, &[("implicit_accuracy", "g+ above g-")]),
        chart(
            "Size of the gaps",
            "|beta g|",
            true,
            &[("beta_gap_q10", "10 %"), ("beta_gap_q50", "median"), ("beta_gap_q90", "90 %")],
        ),
        chart(
            "Denoising errors",
            "weighted error",
            false,
            &[
                ("error_policy_plus", "policy, D+"),
                ("error_reference_plus", "reference, D+"),
                ("error_policy_minus", "policy, D-"),
                ("error_reference_minus", "reference, D-"),
            ],
        ),
        chart("Gradient norm", "norm before clipping", true, &[("grad_norm", "norm")]),
        chart(
            "Level of the generations",
            "dBFS",
            false,
            &[("level_dbfs", "level"), ("loudness_lufs", "loudness, LUFS"), ("peak_dbfs", "peak")],
        ),
        chart("Brightness of the generations", "Hz", false, &[("centroid_hz", "spectral centroid")]),
        chart("Size of the generations' latents", "RMS", false, &[("latent_rms", "latents")]),
    ];
    // Validations watch other rewards under their names, the base's value beside each.
    let watched = lines.iter().filter_map(serde_json::Value::as_object).flat_map(|line| line.keys());
    let watched: std::collections::BTreeSet<&str> =
        watched.filter_map(|key| key.strip_suffix(" (base)")).collect();
    let watched = watched.iter().filter_map(|key| {
        let name = key.trim_start_matches("valid/");
        let title = format!("Not optimised: {name}, on validation prompts");
        chart(&title, name, false, &[(key, "tuned"), (&format!("{key} (base)"), "base")])
    });
    charts.into_iter().flatten().chain(watched).collect()
}

/// Writes `report.json`, `report.html` and the examples of the systems.
pub(super) fn write(
    summary: &Summary,
    page: &report::Report,
    systems: &[System],
    ctx: &RunContext,
) -> Result<()> {
    let dir = &ctx.out_dir;
    fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
    let samples = dir.join("samples");
    for (system, label) in systems.iter().zip(["base", "tuned"]) {
        for (i, clip) in system.examples.iter().enumerate() {
            fs::create_dir_all(&samples).map_err(Error::io("create", &samples))?;
            let song = &summary.songs[i];
            let name = slug(song.caption.as_deref().unwrap_or(&song.id));
            let path = samples.join(format!("{i:03}-{name}.{label}.wav"));
            dragon_audio::write_wav(&path, clip, SampleFormat::Int16)
                .map_err(Error::input("cannot write audio"))?;
        }
    }
    let json = serde_json::to_vec_pretty(summary).map_err(|err| Error::Bug(err.to_string()))?;
    write_atomic(&dir.join("report.json"), &json)?;
    page.write(&dir.join("report.html"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warnings_of_a_run_are_facts_with_their_step() {
        let lines = ["{\"step\":0,\"loss\":0.5}", "{\"step\":4,\"warnings\":[\"a\",\"b\"]}"];
        let log: Vec<_> = lines.iter().map(|line| serde_json::from_str(line).unwrap()).collect();
        let fact = |text: &str| ("warning at step 5".to_owned(), text.to_owned());
        assert_eq!(training_warnings(&log), [fact("a"), fact("b")]);
    }
}
