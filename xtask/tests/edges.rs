//! The arrows between our crates, as `docs/architecture.md` draws them: a dependency that is not in this table fails.

use std::collections::BTreeMap;
use std::process::Command;

/// crate -> crates of ours it may depend on (dev-dependencies on `dragon-testkit` are always allowed).
const ALLOWED: [(&str, &[&str]); 14] = [
    ("dragon-audio", &[]),
    ("dragon-data", &["dragon-audio"]),
    ("dragon-nn", &[]),
    ("dragon-dist", &[]),
    ("dragon-metrics", &[]),
    ("dragon-vae", &["dragon-nn", "dragon-audio"]),
    ("dragon-encoders", &["dragon-nn", "dragon-audio", "dragon-vae"]),
    ("dragon-diffusion", &["dragon-nn"]),
    ("dragon-musicgen", &["dragon-nn"]),
    ("dragon-rewards", &["dragon-metrics", "dragon-dist"]),
    (
        "dragon-trainer",
        &[
            "dragon-audio",
            "dragon-data",
            "dragon-diffusion",
            "dragon-dist",
            "dragon-encoders",
            "dragon-metrics",
            "dragon-musicgen",
            "dragon-nn",
            "dragon-rewards",
            "dragon-vae",
        ],
    ),
    ("dragon-cli", &["dragon-audio", "dragon-data", "dragon-metrics", "dragon-trainer"]),
    ("dragon-testkit", &[]),
    ("xtask", &[]),
];

#[test]
fn crates_depend_only_along_the_arrows() {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo metadata starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let allowed: BTreeMap<&str, &[&str]> = ALLOWED.into_iter().collect();
    let packages = metadata["packages"].as_array().unwrap();
    assert_eq!(packages.len(), allowed.len(), "the table and the workspace list different crates");
    let mut wrong = Vec::new();
    for package in packages {
        let name = package["name"].as_str().unwrap();
        let may = allowed.get(name).unwrap_or_else(|| panic!("crate `{name}` is not in the table"));
        for dependency in package["dependencies"].as_array().unwrap() {
            let to = dependency["name"].as_str().unwrap();
            let test_only = dependency["kind"] == "dev" && to == "dragon-testkit";
            if allowed.contains_key(to) && !may.contains(&to) && !test_only {
                wrong.push(format!("{name} -> {to}"));
            }
        }
    }
    assert!(wrong.is_empty(), "edges against the arrows: {wrong:?}");
}
