//! Several presets in a row, their table, and what a second call leaves alone.

mod common;

use common::*;

#[test]
fn presets_are_run_once_and_their_win_rates_stand_in_one_table() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let command = "reproduce clap-score vendi --out all --set rollout.songs_per_step=4 --set rollout.songs_per_prompt=2 \
                   --set rollout.sampler.n_steps=1 --set update.micro_batch=4 --set run.steps=1 \
                   --set validation.n_prompts=2 --set validation.sampler.n_steps=1 --set eval.n_prompts=2 \
                   --set eval.sampler.n_steps=1 --set eval.bootstrap.subsets=3 --set eval.bootstrap.songs=2 \
                   --set eval.examples=0";
    let stdout = accepted(dir, command);
    let table = std::fs::read_to_string(dir.join("all/tables.md")).unwrap();
    for part in
        ["| clap-score | 2 |", "| vendi | 2 |", "mean of the targets: [", "(paper, Table 10)", "## vendi"]
    {
        assert!(table.contains(part), "`{part}` is missing in\n{table}");
    }
    assert!(stdout.contains("mean of the targets"), "{stdout}");
    let first = |run: &str| -> serde_json::Value {
        let text = std::fs::read(dir.join(format!("all/{run}/report.json"))).unwrap();
        serde_json::from_slice::<serde_json::Value>(&text).unwrap()["metrics"][0]["name"].clone()
    };
    assert_eq!(first("clap-score"), "CLAP score", "the run's reward comes first");
    assert_eq!(first("vendi"), "Vendi, musicnn");

    // Rewards that are not optimised are watched, each beside the base's.
    let log = std::fs::read_to_string(dir.join("all/vendi/metrics.jsonl")).unwrap();
    let log: serde_json::Value = serde_json::from_str(log.lines().last().unwrap()).unwrap();
    for key in ["valid/reward", "valid/CLAP score", "valid/CLAP score (base)", "valid/CLAP score (songs won)"]
    {
        assert!(log[key].is_number(), "{key} in {log}");
    }
    assert!(log.get("valid/Vendi, musicnn").is_none(), "the target is `reward`: {log}");
    for key in ["loudness_lufs", "level_dbfs", "peak_dbfs", "centroid_hz", "latent_rms"] {
        assert!(log[key].is_number(), "{key} in {log}");
    }

    let made = |run: &str| {
        std::fs::metadata(dir.join(format!("all/{run}/report.json"))).unwrap().modified().unwrap()
    };
    let before = [made("clap-score"), made("vendi")];
    assert_eq!(accepted(dir, command), stdout);
    assert_eq!([made("clap-score"), made("vendi")], before, "nothing is measured twice");
    // The tables hold what an earlier call made, and say by which command.
    let one = command.replace("reproduce clap-score vendi", "reproduce vendi");
    assert_eq!(accepted(dir, &one), stdout);
    let again = std::fs::read_to_string(dir.join("all/tables.md")).unwrap();
    for part in [
        "| clap-score | 2 |",
        "| vendi | 2 |",
        "dragon reproduce clap-score vendi --out all",
        "seed 1, commit",
    ] {
        assert!(again.contains(part), "`{part}` is missing in\n{again}");
    }
    accepted(dir, &format!("{command} --set eval.seed=2"));
    assert!(made("clap-score") > before[0], "another evaluation is made anew");
    refused(
        dir,
        "reproduce vendi no-such-preset --out all",
        &["there is no preset `finetune/no-such-preset`"],
    );
}
