//! Models as systems of `dragon score`: a model folder, or a fine-tuning run, whose songs are generated before they are
//! measured (paper appendix D).

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use dragon_trainer::RunContext;
use dragon_trainer::bundle::{Prompt, Split, some_prompts_of};
use dragon_trainer::diffusion::{tuned_dir, weights_path};
use dragon_trainer::generate::Wanted;
use dragon_trainer::inputs::{Inputs, sha256};
use dragon_trainer::run::write_atomic;
use toml::Table;

use super::generator::{Generator, Published};
use crate::settings;

/// What models are asked for.
#[derive(clap::Args)]
pub struct ModelArgs {
    /// Which prompts of the file a model answers: train, valid or test
    #[arg(long, default_value = "test", value_name = "SPLIT", value_parser = split)]
    split: Split,
    /// How many of them, spread over the split
    #[arg(long, default_value_t = 64, value_name = "N")]
    songs: usize,
    /// Length of the songs of Stable Audio Open and MusicGen
    #[arg(long, default_value_t = 10.0, value_name = "S")]
    seconds: f64,
}

fn split(name: &str) -> std::result::Result<Split, String> {
    match name {
        "train" => Ok(Split::Train),
        "valid" => Ok(Split::Valid),
        "test" => Ok(Split::Test),
        _ => Err("expected train, valid or test".into()),
    }
}

/// A model that a path names.
#[derive(Debug)]
struct Model {
    /// As it is called in tables: the folder's name.
    name: String,
    /// The model folder.
    folder: PathBuf,
    /// The run that tuned it.
    tuned: Option<PathBuf>,
}

impl Model {
    /// The model, if `path` is a model folder or a fine-tuning run.
    fn of(path: &Path) -> Result<Option<Self>> {
        let run = path.join("run.toml");
        let is_model = path.join("bundle.json").is_file() || Published::of(path).is_some();
        let (folder, tuned) = match is_model {
            true => (path.to_owned(), None),
            false if run.is_file() => {
                let text = std::fs::read_to_string(&run)
                    .with_context(|| format!("cannot read `{}`", run.display()))?;
                let table: Table = text.parse().with_context(|| format!("`{}` is broken", run.display()))?;
                let bundle = table.get("config").and_then(|config| config.get("bundle")?.as_str());
                let Some(bundle) = bundle else {
                    bail!(
                        "`{}` is a run, but not of `dragon finetune`\nhint: name its model folder",
                        path.display()
                    )
                };
                (bundle.into(), Some(path.to_owned()))
            }
            false => return Ok(None),
        };
        // `.` and `..` have no name of their own.
        let whole = if path.file_name().is_some() { path.to_owned() } else { path.canonicalize()? };
        let name = whole.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok(Some(Self { name, folder, tuned }))
    }

    /// Everything its songs depend on.
    fn state(&self, generator: &Generator, seed: u64) -> Result<Table> {
        let mut inputs = Inputs::default();
        inputs.add_bundle(&self.folder)?;
        let mut files = inputs.to_table();
        if let Some(run) = &self.tuned {
            let dir = tuned_dir(run)?;
            files.insert("tuned".into(), sha256(&[weights_path(&dir).unwrap_or(dir)])?.into());
        }
        let mut table = generator.settings()?;
        table.insert("seed".into(), seed.to_string().into());
        table.insert("files".into(), files.into());
        Ok(table)
    }
}

/// Systems of which some are models that have still to make their songs.
pub struct Plan {
    /// Folders or files of all systems, as they were named or as they will be.
    systems: Vec<PathBuf>,
    models: Vec<Planned>,
    songs: Vec<Prompt>,
}

/// A model that is to make songs.
struct Planned {
    /// As it was named.
    given: String,
    model: Model,
    generator: Generator,
    seed: u64,
    /// Folder of its songs.
    dir: PathBuf,
}

impl Planned {
    /// The file beside the songs that says what made them.
    fn noted(&self) -> PathBuf {
        self.dir.with_file_name(format!("{}.toml", self.model.name))
    }

    /// Checks that the folder has no songs of something else, and gives the text for [`Self::noted`].
    fn check(&self, songs: &[Prompt]) -> Result<String> {
        let mut state = self.model.state(&self.generator, self.seed)?;
        let songs: Table = songs.iter().map(|song| (song.id.clone(), song.caption.clone().into())).collect();
        state.insert("songs".into(), songs.into());
        let state = toml::to_string(&state)?;
        match std::fs::read_to_string(self.noted()) {
            Ok(text) if text == state => Ok(state),
            Ok(_) => bail!(
                "`{}` holds songs that were made otherwise: weights, seed, prompts or a setting differ from `{}`\n\
                 hint: name another --out, or remove both",
                self.dir.display(),
                self.noted().display()
            ),
            Err(_) if self.dir.exists() => bail!(
                "`{}` is there already, and nothing says what made its songs\nhint: name another --out",
                self.dir.display()
            ),
            Err(_) => Ok(state),
        }
    }
}

impl Plan {
    /// Finds the models among `systems` and checks that they can answer.
    ///
    /// # Errors
    /// If there are no prompts for a model, one of them cannot name a file, or two models have one name.
    pub fn new(
        systems: &[String],
        prompts: Option<&Path>,
        args: &ModelArgs,
        seed: u64,
        out: &Path,
    ) -> Result<Self> {
        let mut plan = Self {
            systems: systems.iter().map(|system| settings::path(system)).collect(),
            models: Vec::new(),
            songs: Vec::new(),
        };
        let mut names = Vec::new();
        for (path, given) in plan.systems.iter_mut().zip(systems) {
            let Some(model) = Model::of(path)? else { continue };
            if names.contains(&model.name) {
                bail!(
                    "two models are called `{}`\nhint: name folders that end differently, or score one of them on its own",
                    model.name
                );
            }
            let Some(file) = prompts else {
                bail!(
                    "`{given}` is a model, and there are no prompts for it to answer\n\
                     hint: --prompts builtin:tiny/prompts.jsonl"
                )
            };
            if plan.songs.is_empty() {
                plan.songs = some_prompts_of(file, args.split, args.songs)?;
                if let Some(bad) = plan.songs.iter().find(|prompt| prompt.id.contains(['/', '\\'])) {
                    bail!(
                        "the id `{}` of `{}` cannot name a song\nhint: use ids without slashes",
                        bad.id,
                        file.display()
                    );
                }
            }
            let mut set = vec![format!("model={}", settings::quoted(&model.folder)), format!("seed={seed}")];
            set.extend(model.tuned.iter().map(|run| format!("tuned={}", settings::quoted(run))));
            if Published::of(&model.folder).is_some() {
                set.push(format!("seconds={:?}", args.seconds));
            }
            let (generator, seed, _) = Generator::resolve(None, &set)?;
            let dir = out.join("songs").join(&model.name);
            names.push(model.name.clone());
            *path = dir.clone();
            plan.models.push(Planned { given: given.clone(), model, generator, seed, dir });
        }
        Ok(plan)
    }

    /// Whether there is no model.
    pub fn is_done(&self) -> bool {
        self.models.is_empty()
    }

    /// The systems that are there already.
    pub fn present(&self) -> Vec<PathBuf> {
        let made = |path: &&PathBuf| !self.models.iter().any(|model| model.dir == **path);
        self.systems.iter().filter(made).cloned().collect()
    }

    /// Generates the songs that are not there yet into `OUT/songs/NAME/ID.wav`; gives the folders or files of all systems.
    ///
    /// # Errors
    /// If the output folder has songs of something else, a model cannot make songs, or the run was stopped.
    pub fn generate(self, ctx: &RunContext) -> Result<Vec<PathBuf>> {
        let states = self.models.iter().map(|model| model.check(&self.songs)).collect::<Result<Vec<_>>>()?;
        for (model, state) in self.models.into_iter().zip(states) {
            std::fs::create_dir_all(&model.dir)
                .with_context(|| format!("cannot create `{}`", model.dir.display()))?;
            write_atomic(&model.noted(), state.as_bytes())?;
            let wanted = self.songs.iter().map(|prompt| Wanted {
                prompt: prompt.caption.clone(),
                seed: model.seed,
                file: format!("{}.wav", prompt.id),
            });
            let missing: Vec<Wanted> = wanted.filter(|song| !model.dir.join(&song.file).exists()).collect();
            if missing.is_empty() {
                continue;
            }
            tracing::info!("{} songs by {}", missing.len(), model.given);
            let ctx = RunContext { out_dir: model.dir, ..ctx.clone() };
            if model.generator.run(&missing, &ctx)?.len() < missing.len() {
                bail!("stopped before all songs were made\nhint: the same command goes on where it stopped");
            }
        }
        Ok(self.systems)
    }
}
