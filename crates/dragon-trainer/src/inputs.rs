//! Which files a run reads, as hashes: they stand in `run.toml` with the config, so that a run that is continued with
//! other files, of the same names or not, is refused.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use dragon_encoders::{clap, codec};
use dragon_rewards::{Exemplars, RewardConfig};
use sha2::{Digest, Sha256};

use crate::embed;
use crate::embedder::{EmbedConfig, EncoderConfig, no_clap};
use crate::error::{Error, Result};
use crate::run::{INPUTS, hex};
use crate::{musicgen, stable_audio};

/// Files of a model's folder, weights first: what is missing is best said by them.
const MODEL: [&str; 2] = ["model.safetensors", "config.json"];
/// The same of a model that reads text.
const TEXT_MODEL: [&str; 3] = ["model.safetensors", "config.json", "tokenizer.json"];

/// SHA-256 of each of the things that a run reads.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Inputs(BTreeMap<String, String>);

impl Inputs {
    /// Adds one thing under the config key that names it (and what it is, if a key names several things).
    ///
    /// # Errors
    /// If a file cannot be read.
    pub fn add(&mut self, name: impl Into<String>, files: &[PathBuf]) -> Result<()> {
        self.0.insert(name.into(), sha256(files)?);
        Ok(())
    }

    /// Adds the parts of a model folder.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub fn add_bundle(&mut self, dir: &Path) -> Result<()> {
        if stable_audio::is_published(dir) {
            return self.add("bundle", &stable_audio::files(dir)?);
        }
        if musicgen::is_published(dir) {
            return self.add("bundle", &musicgen::files(dir)?);
        }
        self.add("bundle: dit", &inside(&dir.join("dit"), &MODEL))?;
        self.add("bundle: vae", &inside(&dir.join("vae"), &MODEL))?;
        self.add("bundle: t5", &inside(&dir.join("t5"), &TEXT_MODEL))?;
        self.add("bundle: bundle.json", &[dir.join("bundle.json")])
    }

    /// Adds the encoders that rewards name, and their exemplars.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub fn add_reward(&mut self, reward: &RewardConfig, embed: &EmbedConfig) -> Result<()> {
        for source in reward.sources() {
            let name = format!("embed.encoders.{}", source.encoder);
            match embed.encoders.get(&source.encoder) {
                // The model folder's VAE; an unknown name is refused when the encoders are loaded.
                Some(EncoderConfig::Vae) | None => {}
                Some(encoder) => self.add(name, &encoder_files(encoder, Path::new(""))?)?,
            }
        }
        for (_, exemplars) in reward.references() {
            let (path, files) = match exemplars {
                Exemplars::Audio { path } => (path.clone(), embed::audio_files(&path)?),
                Exemplars::Texts { path } | Exemplars::Statistics { path, .. } => (path.clone(), vec![path]),
            };
            self.add(format!("reward.exemplars: {}", path.display()), &files)?;
        }
        Ok(())
    }

    /// The hashes as a table.
    pub fn to_table(&self) -> toml::Table {
        self.0.iter().map(|(name, hash)| (name.clone(), hash.clone().into())).collect()
    }
}

/// Checks that a run began from the model folder `bundle`, by the contents that it noted; one that noted nothing passes.
///
/// # Errors
/// If it began from another, or a file cannot be read.
pub(crate) fn check_bundle(run: &Path, bundle: &Path) -> Result<()> {
    let path = run.join("run.toml");
    let text = std::fs::read_to_string(&path).map_err(Error::io("read", &path))?;
    let config = text.parse::<toml::Table>().ok().and_then(|table| table.get("config").cloned());
    let noted =
        config.as_ref().and_then(|config| config.get(INPUTS)?.as_table()).cloned().unwrap_or_default();
    let mut inputs = Inputs::default();
    inputs.add_bundle(bundle)?;
    let differs = |(name, hash): (&String, &toml::Value)| {
        name.starts_with("bundle") && inputs.0.get(name).map(String::as_str) != hash.as_str()
    };
    if !noted.iter().any(differs) {
        return Ok(());
    }
    let named = config.as_ref().and_then(|config| config.get("bundle")?.as_str()).unwrap_or("unknown");
    Err(Error::Data {
        problem: format!(
            "`{}` was tuned from another model folder than what `{}` holds now (then `{named}`)",
            run.display(),
            bundle.display()
        ),
        hint: "name the model folder that it began from".into(),
    })
}

/// The files that an encoder is read from; `bundle` is the model folder, whose VAE is one.
///
/// # Errors
/// If it is not told which files a CLAP or codec is read from.
pub(crate) fn encoder_files(encoder: &EncoderConfig, bundle: &Path) -> Result<Vec<PathBuf>> {
    Ok(match encoder {
        EncoderConfig::Musicnn { weights } => vec![weights.clone()],
        EncoderConfig::Clap { dir } => clap::files(dir).map_err(no_clap)?,
        EncoderConfig::Codec { path } | EncoderConfig::Vggish { weights: path } => {
            codec::files(path).map_err(Error::input("cannot find the encoder's files"))?
        }
        EncoderConfig::Vae if stable_audio::is_published(bundle) => stable_audio::files(bundle)?,
        EncoderConfig::Vae => inside(&bundle.join("vae"), &MODEL),
    })
}

fn inside(dir: &Path, names: &[&str]) -> Vec<PathBuf> {
    names.iter().map(|name| dir.join(name)).collect()
}

/// SHA-256 of the contents of files in their order, in hex; names do not count.
///
/// # Errors
/// If a file cannot be read.
pub fn sha256(files: &[PathBuf]) -> Result<String> {
    let mut all = Sha256::new();
    for path in files {
        let mut one = Sha256::new();
        File::open(path)
            .and_then(|mut file| std::io::copy(&mut file, &mut one))
            .map_err(Error::io("read", path))?;
        all.update(one.finalize());
    }
    Ok(hex(&all.finalize()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hash_tells_contents_and_their_order_but_no_names() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let (a, b, c) = (file("a", "1"), file("b", "2"), file("c", "1"));
        let of = |files: &[&PathBuf]| sha256(&files.iter().map(|f| f.to_path_buf()).collect::<Vec<_>>());
        assert_eq!(of(&[&a, &b]).unwrap(), of(&[&c, &b]).unwrap());
        assert_ne!(of(&[&a, &b]).unwrap(), of(&[&b, &a]).unwrap());
        // Where one file ends and the next begins counts.
        let (whole, empty) = (file("d", "12"), file("e", ""));
        assert_ne!(of(&[&a, &b]).unwrap(), of(&[&whole, &empty]).unwrap());
        let err = of(&[&dir.path().join("gone")]).unwrap_err();
        assert!(err.to_string().contains("gone") && err.exit_code() == 1, "{err}");
    }

    #[test]
    fn the_encoders_and_exemplars_of_a_reward_are_noted_each() {
        let dir = tempfile::tempdir().unwrap();
        let clap = dir.path().join("clap");
        std::fs::create_dir(&clap).unwrap();
        let files = [
            "musicnn.safetensors",
            "clap/model.safetensors",
            "clap/config.json",
            "clap/tokenizer.json",
            "texts.txt",
        ];
        let config = serde_json::to_string(&clap::Config::tiny()).unwrap();
        let write = |file: &str, version: usize| {
            let text = match file.ends_with("config.json") {
                true => format!("{config}{}", " ".repeat(version)), // it is read, to tell whose layout the folder has
                false => version.to_string(),
            };
            std::fs::write(dir.path().join(file), text).unwrap();
        };
        files.into_iter().for_each(|file| write(file, 1));
        let at = |name: &str| format!("'{}'", dir.path().join(name).display());
        let embed = toml::from_str(&format!(
            "[encoders.musicnn]\nkind='musicnn'\nweights={}\n[encoders.clap]\nkind='clap'\ndir={}\n[settings.ma]\nkind='ma'\nn_windows=8\nwhole=true",
            at("musicnn.safetensors"),
            at("clap")
        ))
        .unwrap();
        let reward = toml::from_str(&format!(
            "kind='random_mix'\n[[rewards]]\nkind='vendi'\nencoder='musicnn'\nsetting='ma'\npooling='windows'\n\
             [[rewards]]\nkind='per_song_fad'\nencoder='clap'\nsetting='ma'\nexemplars={{kind='texts', path={}}}",
            at("texts.txt")
        ))
        .unwrap();
        let noted = || {
            let mut inputs = Inputs::default();
            inputs.add_reward(&reward, &embed).unwrap();
            inputs.to_table()
        };
        let before = noted();
        let texts = format!("reward.exemplars: {}", dir.path().join("texts.txt").display());
        let names = [
            "embed.encoders.musicnn",
            "embed.encoders.clap",
            "embed.encoders.clap",
            "embed.encoders.clap",
            &texts,
        ];
        for (file, name) in files.into_iter().zip(names) {
            write(file, 2);
            let after = noted();
            let changed: Vec<&String> = after.keys().filter(|key| after[*key] != before[*key]).collect();
            assert_eq!(changed, [name], "{file}");
            write(file, 1);
        }
    }
}
