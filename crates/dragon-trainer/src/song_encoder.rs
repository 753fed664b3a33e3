//! One encoder with its setting, as `embed`, `stats` and `score` use it: from an audio file to its rows, through the
//! cache.

use std::path::Path;

use candle_core::Device;
use dragon_metrics::Rows;

use crate::bundle::Bundle;
use crate::cache::Cache;
use crate::embed;
use crate::embedder::{Encoder, EncoderConfig, Setting, latents_of, texts_of};
use crate::error::{Error, Result};
use crate::inputs;

/// What turns files into rows.
pub struct SongEncoder {
    encoder: Encoder,
    setting: Setting,
    /// The model folder, for the encoder `vae` only.
    bundle: Option<Bundle>,
    id: String,
    /// With what the embeddings depend on besides the file.
    cache: Option<(Cache, String)>,
}

impl SongEncoder {
    /// Checks that an encoder and a setting go together.
    ///
    /// # Errors
    /// If they do not; says which setting the encoder takes.
    pub fn check(encoder: &EncoderConfig, setting: &Setting) -> Result<()> {
        encoder.check_setting(setting).map_err(|expected| Error::Data {
            problem: format!("the encoder, of kind `{}`, and the setting do not fit", encoder.kind()),
            hint: format!("take {expected}"),
        })
    }

    /// Loads the encoder; `model` is the model folder, of which the encoder `vae` is a part.
    ///
    /// # Errors
    /// As [`SongEncoder::check`], and if a file is missing or broken.
    pub fn load(
        cfg: &EncoderConfig,
        setting: Setting,
        model: &Path,
        device: &Device,
        cache: Option<Cache>,
    ) -> Result<Self> {
        Self::check(cfg, &setting)?;
        let encoder = Encoder::load(cfg, device)?;
        let bundle = match &encoder {
            Encoder::Vae => Some(Bundle::load(model, device)?),
            _ => None,
        };
        let id = match encoder.audio() {
            Some(encoder) => encoder.id().to_owned(),
            None => format!("the VAE of {}", model.display()),
        };
        let cache = match cache {
            Some(cache) => {
                let kind = cfg.kind();
                let weights = inputs::sha256(&inputs::encoder_files(cfg, model)?)?;
                let setting = serde_json::to_string(&setting).map_err(|err| Error::Bug(err.to_string()))?;
                // The last bits differ from device to device.
                let device = if device.is_cpu() { "cpu" } else { "gpu" };
                Some((cache, format!("{kind}\n{weights}\n{setting}\n{device}")))
            }
            None => None,
        };
        Ok(Self { encoder, setting, bundle, id, cache })
    }

    /// Name and weights.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Length of a row.
    pub fn dim(&self) -> usize {
        match (self.encoder.audio(), &self.bundle) {
            (Some(encoder), _) => encoder.dim(),
            (None, Some(bundle)) => bundle.latent_shape(1).1,
            (None, None) => 0,
        }
    }

    /// The rows of a file.
    ///
    /// # Errors
    /// If it cannot be read or embedded.
    pub fn embed(&self, file: &Path) -> Result<Rows> {
        let make = || match (self.encoder.audio(), &self.bundle) {
            (Some(encoder), _) => embed::embed_file(encoder, &self.setting, file),
            (None, Some(bundle)) => latents_of(file, bundle),
            (None, None) => Err(Error::Bug("the encoder `vae` without a model folder".into())),
        };
        match &self.cache {
            Some((cache, maker)) => cache.rows(maker, file, make),
            None => make(),
        }
    }

    /// The rows of texts, one each.
    ///
    /// # Errors
    /// If the encoder reads no text.
    pub fn embed_texts(&self, texts: &[String]) -> Result<Rows> {
        match &self.encoder {
            Encoder::Clap(clap) => texts_of(texts, clap),
            _ => Err(Error::config("encoder", "an encoder of kind `clap`, which reads text", &self.id)),
        }
    }
}
