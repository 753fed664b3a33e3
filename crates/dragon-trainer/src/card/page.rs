//! The card in tables, and as a page with pictures and players.

use dragon_metrics::WinRate;

use super::asked::in_words;
use super::{Card, CardConfig, System};
use crate::eval::number;
use crate::report;
use crate::run::RunContext;

impl Card {
    /// The card's tables: title, head and rows.
    fn tables(&self, cfg: &CardConfig) -> Vec<report::Table> {
        let mut head: Vec<String> = vec!["songs".into()];
        head.extend(cfg.views.iter().map(|view| format!("FAD, {}", view.encoder)));
        head.extend(["level, dBFS".into(), "centroid, Hz".into()]);
        let rows = self.systems.iter().map(|system| {
            let mut row = vec![system.name.clone()];
            row.extend(
                system.fad.iter().chain([&system.level_dbfs, &system.centroid_hz]).map(|x| number(*x)),
            );
            row
        });
        let distances = report::Table {
            title: "Distance to held-out music".into(),
            note: format!(
                "Dataset FAD to {} clips, of {} songs each; the two halves share no piece.",
                self.n_clips.0, self.n_clips.1
            ),
            head,
            rows: rows.collect(),
        };
        let vae = report::Table {
            title: "Reconstruction by the VAE".into(),
            note: "Held-out clips; for scale, each clip's own median spectrum held constant.".into(),
            head: ["number", "VAE", "median spectrum"].map(str::to_owned).into(),
            rows: vec![
                vec![
                    "mel distance".into(),
                    number(self.vae.mel_distance),
                    number(self.vae.mel_distance_of_median),
                ],
                vec!["SI-SDR, dB".into(), number(self.vae.si_sdr_db), "-".into()],
            ],
        };
        let captions = report::Table {
            title: "Songs and their captions".into(),
            note: "Score of a caption with its own song and with another caption's; share of captions that fit their own better."
                .into(),
            head: ["judge and songs", "own", "other", "won (95 %)", "p by chance"].map(str::to_owned).into(),
            rows: self
                .captions
                .iter()
                .map(|t| {
                    let chance = format!("{:.1e}", t.p_value);
                    vec![t.name.clone(), number(t.own), number(t.other), share(&t.won), chance]
                })
                .collect(),
        };
        let music = report::Table {
            title: "What rewards say of music".into(),
            note: "Held-out music beside the generation for the same caption: the share of captions for which the music is \
                   better is what tuning could win by making music. Distances are to the reference half."
                .into(),
            head: ["reward", "music", "generations", "music better (95 %)"].map(str::to_owned).into(),
            rows: self
                .music
                .iter()
                .map(|t| vec![t.name.clone(), number(t.music), number(t.generations), share(&t.won)])
                .collect(),
        };
        let mut tables = vec![distances, vae, captions, music];
        if let Some(clap) = &self.clap {
            let percent = |x: f64| format!("{:.1} %", 100.0 * x);
            let row = |name: &str, r: &crate::pretrain::clap::Recall| {
                vec![
                    name.to_owned(),
                    percent(r.at_1),
                    percent(r.at_5),
                    percent(r.at_10),
                    number(r.median_rank),
                ]
            };
            let n = clap.n as f64;
            tables.push(report::Table {
                title: "Retrieval by CLAP".into(),
                note: format!("One clip of each of {} held-out pieces.", clap.n),
                head: ["from", "recall at 1", "at 5", "at 10", "median rank"].map(str::to_owned).into(),
                rows: vec![
                    row("clip to caption", &clap.text),
                    row("caption to clip", &clap.audio),
                    vec![
                        "chance".into(),
                        percent(1.0 / n),
                        percent(5.0 / n),
                        percent(10.0 / n),
                        number(n / 2.0),
                    ],
                ],
            });
        }
        tables
    }

    /// The card for a terminal.
    pub fn text(&self, cfg: &CardConfig) -> String {
        let tables = self.tables(cfg);
        tables.iter().map(|t| format!("{}\n{}", t.title, t.to_text())).collect::<Vec<_>>().join("\n")
    }
}

/// A win rate with its interval.
fn share(won: &WinRate) -> String {
    let [rate, lower, upper] = [won.rate, won.lower, won.upper].map(|x| 100.0 * x);
    format!("{rate:.1} % of {} ({lower:.1} to {upper:.1})", won.n)
}

pub(super) fn page(
    cfg: &CardConfig,
    card: &Card,
    systems: &[System],
    captions: &[&str],
    sample_rate_hz: u32,
    ctx: &RunContext,
) -> report::Report {
    let take = |system: &System, i: usize, label: &str| report::Take {
        label: label.to_owned(),
        samples: system.examples[i].clone(),
        sample_rate_hz,
        note: in_words(system.keys[i], system.bpms[i]),
    };
    let songs = (0..cfg.examples.min(captions.len()))
        .map(|i| report::Song {
            caption: captions[i].to_owned(),
            takes: vec![
                take(&systems[0], i, "music"),
                take(&systems[1], i, "its round trip"),
                take(&systems[2], i, "generation"),
            ],
        })
        .collect();
    report::Report {
        title: "Model card".into(),
        lead: "What the parts of a model folder are worth on music that none of them was trained on.".into(),
        facts: vec![
            ("command".into(), ctx.command.clone()),
            ("commit".into(), ctx.commit.clone()),
            ("sampler".into(), report::as_in_config(&cfg.sampler)),
            ("seed".into(), cfg.seed.to_string()),
        ],
        tables: card.tables(cfg),
        charts: Vec::new(),
        songs,
        appendix: Vec::new(),
    }
}
