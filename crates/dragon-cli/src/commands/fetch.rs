//! `dragon fetch`: published models from the Hugging Face hub.
//!
//! Files go to the hub's cache, which Python's tools share; the model's folder holds links to them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use hf_hub::api::sync::{Api, ApiBuilder, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};
use sha2::{Digest, Sha256};

/// Download a published model from huggingface.co
///
/// Files go to Hugging Face's cache ($HF_HOME, else ~/.cache/huggingface), which Python's tools share, and a download that was cut
/// goes on where it stopped. The output folder holds links to them: name it where a command takes the model.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  dragon fetch                                       which models there are
  dragon fetch clap-music                            LAION's music CLAP to models/clap-music
  dragon fetch t5-base --dry-run                     files and sizes only
  HF_TOKEN=hf_… dragon fetch stable-audio-open-1.0   a model behind an agreement: accept it on its page first")]
pub struct Args {
    /// Which model; without it, the list
    model: Option<String>,
    /// Folder of models: the model's files go below it
    #[arg(short, long, value_name = "DIR", default_value = "models")]
    out: PathBuf,
    /// Only say what would be downloaded
    #[arg(long)]
    dry_run: bool,
}

/// A published model.
struct Model {
    name: &'static str,
    about: &'static str,
    sources: &'static [Source],
}

/// What is taken from a repository of the hub.
struct Source {
    repo: &'static str,
    files: &'static [&'static str],
    /// Folders of the repository (`""` for its own) whose weights are taken, in the first of the usual forms that is there.
    weights: &'static [&'static str],
}

const fn source(
    repo: &'static str,
    files: &'static [&'static str],
    weights: &'static [&'static str],
) -> Source {
    Source { repo, files, weights }
}

const ROBERTA: Source = source("FacebookAI/roberta-base", &["tokenizer.json"], &[]);
const TEXT: &[&str] = &["config.json", "tokenizer.json"];
const CONFIG: &[&str] = &["config.json"];
const WHOLE: &[&str] = &[""];

const fn model(name: &'static str, about: &'static str, sources: &'static [Source]) -> Model {
    Model { name, about, sources }
}

const MODELS: &[Model] = &[
    model(
        "clap-music",
        "LAION-CLAP, music (HTSAT-base): rewards and metrics",
        &[source("lukewys/laion_clap", &["music_audioset_epoch_15_esc_90.14.pt"], &[]), ROBERTA],
    ),
    model(
        "clap-630k",
        "LAION-CLAP, 630k (HTSAT-tiny): rewards and metrics",
        &[source("lukewys/laion_clap", &["630k-audioset-best.pt"], &[]), ROBERTA],
    ),
    model(
        "clap-htsat-unfused",
        "CLAP as Hugging Face has it: rewards and metrics",
        &[source(
            "laion/clap-htsat-unfused",
            &["config.json", "preprocessor_config.json", "tokenizer.json"],
            WHOLE,
        )],
    ),
    model("t5-small", "T5 text encoder", &[source("google-t5/t5-small", TEXT, WHOLE)]),
    model("t5-base", "T5 text encoder", &[source("google-t5/t5-base", TEXT, WHOLE)]),
    model("t5-large", "T5 text encoder", &[source("google-t5/t5-large", TEXT, WHOLE)]),
    model("flan-t5-small", "FLAN-T5 text encoder", &[source("google/flan-t5-small", TEXT, WHOLE)]),
    model("flan-t5-base", "FLAN-T5 text encoder", &[source("google/flan-t5-base", TEXT, WHOLE)]),
    model("flan-t5-large", "FLAN-T5 text encoder", &[source("google/flan-t5-large", TEXT, WHOLE)]),
    model(
        "stable-audio-open-1.0",
        "Stable Audio Open (behind an agreement): generate, finetune, eval",
        &[source(
            "stabilityai/stable-audio-open-1.0",
            &[
                "model_index.json",
                "transformer/config.json",
                "projection_model/config.json",
                "vae/config.json",
                "text_encoder/config.json",
                "tokenizer/tokenizer.json",
            ],
            &["transformer", "projection_model", "vae", "text_encoder"],
        )],
    ),
    model("encodec-24khz", "EnCodec, mono: metrics", &[source("facebook/encodec_24khz", CONFIG, WHOLE)]),
    model("encodec-48khz", "EnCodec, stereo: metrics", &[source("facebook/encodec_48khz", CONFIG, WHOLE)]),
    model("dac-44khz", "DAC: metrics", &[source("descript/dac_44khz", CONFIG, WHOLE)]),
    model("musicgen-small", "MusicGen: generate", &[source("facebook/musicgen-small", TEXT, WHOLE)]),
    model("musicgen-medium", "MusicGen: generate", &[source("facebook/musicgen-medium", TEXT, WHOLE)]),
    model("musicgen-large", "MusicGen: generate", &[source("facebook/musicgen-large", TEXT, WHOLE)]),
];

/// The usual forms of weights, best first; an index stands for the files that it names.
const FORMS: [&str; 5] = [
    "model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
];

/// Runs the command.
pub fn run(args: Args) -> Result<()> {
    let Some(name) = args.model else {
        for model in MODELS {
            let repos: Vec<&str> = model.sources.iter().map(|source| source.repo).collect();
            println!("{:24}{}  ({})", model.name, model.about, repos.join(", "));
        }
        return Ok(());
    };
    let known = || MODELS.iter().map(|model| model.name).collect::<Vec<_>>().join(", ");
    let model = MODELS
        .iter()
        .find(|model| model.name == name)
        .ok_or_else(|| anyhow!("there is no model `{name}`\nhint: models are {}", known()))?;
    let folder = args.out.join(model.name);
    let hub = Hub::new()?;
    let mut files = Vec::new();
    for source in model.sources {
        let found = hub.files(source).with_context(|| by_hand(model, source, &folder, &hub.endpoint))?;
        files.extend(found);
    }
    let total: u64 = files.iter().map(|file| file.size).sum();
    let missing: u64 = files.iter().filter(|file| file.cached.is_none()).map(|file| file.size).sum();
    for file in &files {
        let state = if file.cached.is_some() { "in the cache" } else { "to download" };
        println!("{:>10}  {state:12}  {} of {}", human(file.size), file.path, file.repo);
    }
    println!("{:>10}  in all, {} of it to download", human(total), human(missing));
    for (repo, licence) in hub.licences(model) {
        println!("licence of {repo}, as its page says: {licence}");
    }
    if args.dry_run {
        return Ok(());
    }
    for file in &files {
        let source = model.sources.iter().find(|source| source.repo == file.repo);
        let source = source.ok_or_else(|| anyhow!("no source has {}", file.repo))?;
        let path = hub.download(file).with_context(|| by_hand(model, source, &folder, &hub.endpoint))?;
        link(&path, &folder.join(&file.path))?;
    }
    println!("{}", folder.display());
    Ok(())
}

/// A file of the hub.
struct File {
    repo: &'static str,
    path: String,
    size: u64,
    /// What tells its contents: a SHA-256 (64 digits) for large files, git's SHA-1 of a blob for small ones.
    etag: String,
    cached: Option<PathBuf>,
}

struct Hub {
    api: Api,
    cache: Cache,
    endpoint: String,
}

impl Hub {
    fn new() -> Result<Self> {
        let set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        if !set("HF_HOME") && !set("HOME") && !cfg!(windows) {
            bail!("there is no place for downloads\nhint: set HF_HOME to a folder");
        }
        let cache = Cache::from_env();
        let token =
            std::env::var("HF_TOKEN").ok().filter(|token| !token.is_empty()).or_else(|| cache.token());
        let endpoint = std::env::var("HF_ENDPOINT").unwrap_or_else(|_| "https://huggingface.co".into());
        let api = ApiBuilder::from_cache(cache.clone())
            .with_endpoint(endpoint.clone())
            .with_token(token)
            .with_retries(3)
            .build()
            .context("cannot speak to the hub")?;
        Ok(Self { api, cache, endpoint })
    }

    fn repo(&self, repo: &str) -> ApiRepo {
        self.api.repo(Repo::new(repo.to_owned(), RepoType::Model))
    }

    /// What a source names, with sizes.
    fn files(&self, source: &Source) -> Result<Vec<File>> {
        let repo = self.repo(source.repo);
        let mut paths: Vec<String> = source.files.iter().map(|&file| file.to_owned()).collect();
        if !source.weights.is_empty() {
            let listed: Vec<String> = repo.info()?.siblings.into_iter().map(|file| file.rfilename).collect();
            for folder in source.weights {
                paths.extend(weights_in(folder, &listed).ok_or_else(|| {
                    anyhow!("`{}` holds no weights of a known form in its folder `{folder}`", source.repo)
                })?);
            }
        }
        let file = |path: String| -> Result<File> {
            let metadata = self.api.metadata(&repo.url(&path)).with_context(|| path.clone())?;
            let cached = self.cache.repo(Repo::new(source.repo.to_owned(), RepoType::Model)).get(&path);
            let etag = metadata.etag().trim_start_matches("W/").to_owned();
            Ok(File { repo: source.repo, path, size: metadata.size() as u64, etag, cached })
        };
        paths.into_iter().map(file).collect()
    }

    /// The file in the cache, downloaded if it is not there; its contents are checked either way.
    fn download(&self, file: &File) -> Result<PathBuf> {
        let path = match &file.cached {
            Some(path) => path.clone(),
            None => self.repo(file.repo).download(&file.path)?,
        };
        if !is_whole(&path, file)? {
            // A wrong file in the cache would be believed by everyone who shares it.
            let blob = path.canonicalize().unwrap_or_else(|_| path.clone());
            for path in [blob, path] {
                let _ = std::fs::remove_file(path); // the link, if it is one, may be gone already
            }
            bail!("`{}` was damaged on its way, and is removed: its hash is not {}", file.path, file.etag);
        }
        Ok(path)
    }

    /// What the hub says of licences; nothing where it does not.
    fn licences(&self, model: &Model) -> BTreeMap<&'static str, String> {
        let licence = |source: &Source| -> Option<String> {
            let mut response = self.repo(source.repo).info_request().call().ok()?;
            let json: serde_json::Value = response.body_mut().read_json().ok()?;
            let tags = json["tags"].as_array()?.iter().filter_map(|tag| tag.as_str());
            tags.filter_map(|tag| tag.strip_prefix("license:")).next().map(str::to_owned)
        };
        model.sources.iter().filter_map(|source| Some((source.repo, licence(source)?))).collect()
    }
}

/// The files with the weights of a folder.
fn weights_in(folder: &str, listed: &[String]) -> Option<Vec<String>> {
    let inside = |name: &str| if folder.is_empty() { name.to_owned() } else { format!("{folder}/{name}") };
    let form = FORMS.iter().find(|form| listed.contains(&inside(form)))?;
    let mut files = vec![inside(form)];
    if let Some(one) = form.strip_suffix(".index.json") {
        // `model-00001-of-00002.safetensors`
        let (stem, ending) = one.split_once('.')?;
        let start = inside(&format!("{stem}-"));
        files.extend(listed.iter().filter(|f| f.starts_with(&start) && f.ends_with(ending)).cloned());
    }
    Some(files)
}

/// Whether a file has the size and the hash that the hub tells.
fn is_whole(path: &Path, file: &File) -> Result<bool> {
    let open = || std::fs::File::open(path).with_context(|| format!("cannot read `{}`", path.display()));
    if open()?.metadata()?.len() != file.size {
        return Ok(false);
    }
    if file.etag.len() != 64 {
        return Ok(true); // a small file, whose hash is git's
    }
    let mut hash = Sha256::new();
    std::io::copy(&mut open()?, &mut hash)?;
    let hex: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(hex == file.etag)
}

/// Puts a file of the cache into the model's folder: a link, or a copy where there are none.
fn link(from: &Path, to: &Path) -> Result<()> {
    let failed = || format!("cannot write `{}`", to.display());
    let folder = to.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder).with_context(failed)?;
    let from = from.canonicalize().with_context(|| format!("cannot read `{}`", from.display()))?;
    if to.symlink_metadata().is_ok() {
        std::fs::remove_file(to).with_context(failed)?;
    }
    #[cfg(unix)]
    let made = std::os::unix::fs::symlink(&from, to);
    #[cfg(not(unix))]
    let made = std::fs::copy(&from, to).map(drop);
    made.with_context(failed)
}

/// What to do without the hub.
fn by_hand(model: &Model, source: &Source, folder: &Path, endpoint: &str) -> String {
    let mut files: Vec<String> = source.files.iter().map(|&file| file.to_owned()).collect();
    for folder in source.weights {
        let place = if folder.is_empty() { String::new() } else { format!("{folder}/") };
        files.push(format!("{place}model.safetensors (or what there is of: {})", FORMS.join(", ")));
    }
    format!(
        "cannot fetch `{}`\nhint: without network, put these files of {endpoint}/{} into `{}`:\n  {}\n\
         For a model behind an agreement, accept it on that page and set HF_TOKEN (or log in with Hugging Face's own tool)",
        model.name,
        source.repo,
        folder.display(),
        files.join("\n  ")
    )
}

/// A size in MB or GB.
fn human(bytes: u64) -> String {
    match bytes as f64 {
        b if b >= 1e9 => format!("{:.2} GB", b / 1e9),
        b if b >= 1e6 => format!("{:.1} MB", b / 1e6),
        b => format!("{:.1} kB", b / 1e3),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_taken_in_the_best_form_there_is() {
        let listed = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect::<Vec<String>>();
        let both = listed(&["model.safetensors", "pytorch_model.bin", "vae/config.json"]);
        assert_eq!(weights_in("", &both).unwrap(), ["model.safetensors"]);
        let parts = listed(&[
            "a/model-00001-of-00002.safetensors",
            "a/model-00002-of-00002.safetensors",
            "a/model.safetensors.index.json",
            "a/model.fp16.safetensors",
        ]);
        let want = [
            "a/model.safetensors.index.json",
            "a/model-00001-of-00002.safetensors",
            "a/model-00002-of-00002.safetensors",
        ];
        assert_eq!(weights_in("a", &parts).unwrap(), want);
        assert!(weights_in("b", &parts).is_none());
    }

    #[test]
    fn names_of_models_are_different() {
        let names: std::collections::BTreeSet<&str> = MODELS.iter().map(|model| model.name).collect();
        assert_eq!(names.len(), MODELS.len());
    }
}
