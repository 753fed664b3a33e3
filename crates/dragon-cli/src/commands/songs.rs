//! What the commands that embed songs have in common: the encoder, its setting, the cache, files that are skipped.

use std::path::Path;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use dragon_metrics::Convention;
use dragon_trainer::cache::Cache;
use dragon_trainer::embed::{OnBad, Skipped};
use dragon_trainer::embedder::{EncoderConfig, Setting};
use dragon_trainer::song_encoder::SongEncoder;
use serde::{Deserialize, Serialize};

use crate::settings;

/// How songs are embedded.
#[derive(clap::Args)]
pub struct SongArgs {
    /// `musicnn`, `clap` (the shipped one), `vae` (latent frames of a model folder), or a published model's file or folder:
    /// CLAP (ours, Hugging Face's, or LAION's .pt with tokenizer.json beside it), EnCodec, DAC, VGGish, Stable Audio;
    /// in a config, the table `encoder`
    #[arg(long, value_name = "NAME or PATH")]
    encoder: Option<String>,
    /// How a song is cut into windows; in a config, the table `setting`
    #[arg(long, value_enum)]
    setting: Option<SettingName>,
    /// Seconds between windows; short for --set setting.hop_s=S
    #[arg(long, value_name = "S")]
    hop: Option<f64>,
    /// Model folder whose VAE encodes, for the encoder `vae`
    #[arg(long, value_name = "DIR", default_value = "builtin:tiny")]
    model: String,
    /// Leave out files that cannot be used, and list them, instead of stopping at the first
    #[arg(long)]
    skip_bad: bool,
    /// Embed every song anew; else embeddings are kept in the user's cache folder ($XDG_CACHE_HOME/dragon or
    /// ~/.cache/dragon), by file content, encoder, weights and setting
    #[arg(long)]
    no_cache: bool,
    /// Where tensors live: `cpu` or `cuda`
    #[arg(long, default_value = "cpu")]
    device: String,
}

/// A setting by name.
#[derive(Clone, Copy, ValueEnum)]
enum SettingName {
    /// A window every 0.256 s, as many as fit whole: nine of musicnn's 3 s in 5.12 s
    Windows,
    /// A window every second, zero-padded at the end, as the program fadtk has them
    Fadtk,
    /// What the encoder's own reference cuts a song into: latent frames of EnCodec, DAC and Stable Audio, 0.96 s for VGGish (the
    /// default for these)
    Frames,
    /// Eight windows from start to end and the whole song, each peak-normalised (the paper's MA)
    Ma,
}

/// A preset of presets/embed.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EmbedPreset {
    /// What embeds.
    pub encoder: EncoderConfig,
    /// How a song is cut.
    pub setting: Setting,
}

impl SongArgs {
    /// What the arguments change in a preset with `encoder` and `setting`.
    ///
    /// # Errors
    /// If the encoder is no name and no path.
    pub fn overrides(&self) -> Result<Vec<String>> {
        let mut overrides = Vec::new();
        if let Some(given) =
            self.encoder.as_deref().filter(|given| !["musicnn", "clap", "vae"].contains(given))
            && !settings::path(given).exists()
        {
            bail!(
                "there is no encoder `{given}`\nhint: name musicnn, clap, vae, or the file or folder of a published model"
            );
        }
        let encoder = self.encoder.as_deref().map(|encoder| match encoder {
            "musicnn" => {
                r#"encoder={ kind = "musicnn", weights = "builtin:musicnn/mtt_musicnn.safetensors" }"#.into()
            }
            "clap" => r#"encoder={ kind = "clap", dir = "builtin:tiny/clap" }"#.into(),
            "vae" => "encoder={ kind = \"vae\" }".into(),
            given => {
                let (kind, key) = match EncoderConfig::of_path(&settings::path(given)) {
                    EncoderConfig::Codec { .. } => ("codec", "path"),
                    EncoderConfig::Vggish { .. } => ("vggish", "weights"),
                    _ => ("clap", "dir"),
                };
                if kind != "clap" && self.setting.is_none() {
                    overrides.push(r#"setting={ kind = "frames" }"#.into());
                }
                format!("encoder={{ kind = \"{kind}\", {key} = {} }}", settings::quoted(Path::new(given)))
            }
        });
        overrides.extend(encoder);
        if self.encoder.as_deref() == Some("vae") && self.setting.is_none() {
            overrides.push(r#"setting={ kind = "vae", latent_direct = false }"#.into());
        }
        overrides.extend(self.setting.map(|setting| {
            let value = match setting {
                SettingName::Windows => r#"{ kind = "fadtk", hop_s = 0.256, tail = "whole_windows" }"#,
                SettingName::Fadtk => r#"{ kind = "fadtk", hop_s = 1.0, tail = "zero_padded" }"#,
                SettingName::Frames => r#"{ kind = "frames" }"#,
                SettingName::Ma => r#"{ kind = "ma", n_windows = 8, whole = true }"#,
            };
            format!("setting={value}")
        }));
        overrides.extend(self.hop.map(|hop| format!("setting.hop_s={hop:?}")));
        Ok(overrides)
    }

    /// Where tensors live.
    pub fn device(&self) -> &str {
        &self.device
    }

    /// What happens to a file that cannot be used.
    pub fn on_bad(&self) -> OnBad {
        if self.skip_bad { OnBad::Skip } else { OnBad::Refuse }
    }

    /// Loads the encoder.
    pub fn load(&self, encoder: &EncoderConfig, setting: Setting) -> Result<SongEncoder> {
        let device = dragon_trainer::device(&self.device)?;
        let cache = if self.no_cache { None } else { Cache::of_user() };
        Ok(SongEncoder::load(encoder, setting, &settings::path(&self.model), &device, cache)?)
    }
}

/// A convention by its name.
pub fn convention(name: &str) -> std::result::Result<Convention, String> {
    Convention::ALL
        .into_iter()
        .find(|convention| convention.name() == name)
        .ok_or_else(|| format!("expected one of {}", Convention::ALL.map(Convention::name).join(", ")))
}

/// Checks that a file of embeddings or statistics can be written to `out`; gives its folder, which [`make_folder`] makes when
/// there is something to write.
pub fn check_out<'a>(out: &'a Path, endings: &[&str]) -> Result<&'a Path> {
    let ending = out.extension().and_then(|e| e.to_str()).unwrap_or_default();
    if !endings.contains(&ending) {
        bail!(
            "cannot write `{}`: expected an ending of {}, found `{ending}`\nhint: name a file such as songs.npz",
            out.display(),
            endings.join(", ")
        );
    }
    let parent = out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if let Some(found) = parent.ancestors().find(|dir| dir.exists()).filter(|dir| !dir.is_dir()) {
        bail!("cannot write `{}`: `{}` is a file\nhint: name another place", out.display(), found.display());
    }
    Ok(parent)
}

/// Makes the folder of an output, if it is not there.
pub fn make_folder(dir: &Path) -> Result<()> {
    std::fs::create_dir_all(dir).with_context(|| format!("cannot make the folder `{}`", dir.display()))
}

/// The end of a line about songs: how many files were left out.
pub fn left_out(skipped: &[Skipped]) -> String {
    match skipped.len() {
        0 => String::new(),
        1 => ", 1 file left out (named above)".into(),
        n => format!(", {n} files left out (named above)"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_preset_is_a_valid_config() {
        settings::assert_every_key_is_shown("embed/default", |set| {
            settings::resolve::<EmbedPreset>("embed/default", None, set).map(drop)
        });
    }
}
