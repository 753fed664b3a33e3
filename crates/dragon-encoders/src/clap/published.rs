//! CLAPs as they lie on disk: folders of this project, LAION's own checkpoints, Hugging Face's `ClapModel` folders.
//!
//! LAION's checkpoints (`music_audioset_epoch_15_esc_90.14.pt`, `630k-audioset-best.pt`) hold weights alone: the
//! architecture follows from the shapes of the tensors, the front end is the one that all of them share. Names and
//! front end of Hugging Face's folders: transformers v4.57.6, `modeling_clap.py`, `feature_extraction_clap.py`
//! (Apache-2.0; written from their formulas, no code taken).

use super::encoder::Error;
use super::{Config, htsat, roberta};
use dragon_nn::{Checkpoint, Loader};
use std::path::{Path, PathBuf};

/// How a CLAP lies on disk.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Layout {
    /// Our own names and `config.json`.
    Dragon(Config),
    /// Hugging Face's names and `config.json`.
    HuggingFace(Config),
    /// LAION's names, which are ours, and no config.
    Laion,
}

/// The files of a CLAP.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Files {
    pub(super) layout: Layout,
    pub(super) weights: PathBuf,
    pub(super) tokenizer: PathBuf,
    /// The settings that were read, if any.
    configs: Vec<PathBuf>,
}

/// The files that a CLAP is read from, as [`ClapEncoder::load`](super::ClapEncoder::load) takes its path.
///
/// # Errors
/// If a config is broken, or there is no checkpoint or several.
pub fn files(path: impl AsRef<Path>) -> Result<Vec<PathBuf>, Error> {
    let files = Files::find(path.as_ref())?;
    Ok([files.weights].into_iter().chain(files.configs).chain([files.tokenizer]).collect())
}

impl Files {
    pub(super) fn find(path: &Path) -> Result<Self, Error> {
        let config = path.join("config.json");
        // A folder without config.json is LAION's if it holds a checkpoint; else config.json is what is missing.
        if path.is_file() || (!config.exists() && Checkpoint::find(path).is_ok()) {
            let weights = Checkpoint::find(path)?;
            let tokenizer = weights.with_file_name("tokenizer.json");
            return Ok(Self { layout: Layout::Laion, weights, tokenizer, configs: vec![] });
        }
        let fail = |reason: String| Error::Config { path: config.clone(), reason };
        let text = std::fs::read_to_string(&config).map_err(|e| fail(e.to_string()))?;
        let json: serde_json::Value = serde_json::from_str(&text).map_err(|e| fail(e.to_string()))?;
        let tokenizer = path.join("tokenizer.json");
        if json.get("model_type").is_none() && json.get("audio_config").is_none() {
            // again from the text: its errors say lines
            let parsed: Config = serde_json::from_str(&text).map_err(|e| fail(e.to_string()))?;
            let weights = path.join("model.safetensors");
            return Ok(Self { layout: Layout::Dragon(parsed), weights, tokenizer, configs: vec![config] });
        }
        let theirs: HuggingFace = serde_json::from_value(json).map_err(|e| fail(e.to_string()))?;
        let front_end_path = path.join("preprocessor_config.json");
        let mut configs = vec![config.clone()];
        let front_end = match std::fs::read_to_string(&front_end_path) {
            Ok(text) => {
                configs.push(front_end_path.clone());
                serde_json::from_str(&text)
                    .map_err(|e| Error::Config { path: front_end_path, reason: e.to_string() })?
            }
            Err(_) => FrontEnd::laion(),
        };
        let layout = Layout::HuggingFace(theirs.config(&front_end).map_err(fail)?);
        Ok(Self { layout, weights: Checkpoint::find(path)?, tokenizer, configs })
    }

    /// The config, and the loader of the weights.
    pub(super) fn open(&self) -> Result<(Config, Loader), Error> {
        let checkpoint = Checkpoint::open(&self.weights)?;
        let config = match &self.layout {
            Layout::Dragon(config) | Layout::HuggingFace(config) => config.clone(),
            Layout::Laion => laion_config(&checkpoint)?,
        };
        Ok((config, self.layout.loader(checkpoint)))
    }
}

impl Layout {
    /// A loader that knows the layout's names.
    pub(super) fn loader(&self, checkpoint: Checkpoint) -> Loader {
        match self {
            Self::Dragon(_) | Self::Laion => Loader::same_names(checkpoint),
            Self::HuggingFace(_) => Loader::new(checkpoint, hugging_face_names),
        }
    }

    /// Whether a tensor of the file plays no part in the embeddings.
    pub(super) fn is_unneeded(&self, name: &str) -> bool {
        const BUFFERS: [&str; 5] =
            ["relative_position_index", "attn_mask", "num_batches_tracked", "position_ids", "token_type_ids"];
        // STFT and mel filters follow from the settings; the classifier and the loss's own parts are for training
        const PARTS: [&str; 6] = [
            "audio_branch.spectrogram_extractor.",
            "audio_branch.logmel_extractor.",
            "audio_branch.tscam_conv.",
            "audio_branch.head.",
            "audio_transform.",
            "text_transform.",
        ];
        let is_buffer = || BUFFERS.iter().any(|end| name.rsplit('.').next() == Some(end));
        match self {
            Self::Dragon(_) => false,
            Self::HuggingFace(_) => name == "logit_scale_t" || is_buffer(),
            Self::Laion => {
                name == "logit_scale_t" || is_buffer() || PARTS.iter().any(|part| name.starts_with(part))
            }
        }
    }

    /// Whether others trained it.
    pub(super) fn is_foreign(&self) -> bool {
        !matches!(self, Self::Dragon(_))
    }
}

/// Channels of one attention head in every RoBERTa that was published; no shape tells it.
const ROBERTA_HEAD_DIM: usize = 64;

/// The config of a checkpoint in LAION's layout, by the shapes of its tensors.
pub(super) fn laion_config(checkpoint: &Checkpoint) -> Result<Config, Error> {
    let refuse =
        |reason: &str| Error::Unsupported { path: checkpoint.path().into(), reason: reason.to_string() };
    let patch = "audio_branch.patch_embed.proj.weight";
    let has = |part: &str| checkpoint.names().any(|name| name.contains(part));
    if checkpoint.shape(patch).is_none() {
        return Err(refuse(if has("audio_model.audio_encoder.") {
            "its tensors have Hugging Face's names, but the config is missing\nhint: name the folder with its \
             config.json, model.safetensors and tokenizer.json"
        } else if has("audio_branch.") {
            "its audio branch is no HTSAT\nhint: the published HTSAT checkpoints are \
             music_audioset_epoch_15_esc_90.14.pt (HTSAT-base) and 630k-audioset-best.pt (HTSAT-tiny)"
        } else {
            "it holds no CLAP: there is no `audio_branch.patch_embed.proj.weight`\nhint: is it a checkpoint of another model?"
        }));
    }
    if has("patch_embed.mel_conv2d.") || has("patch_embed.fusion_model.") {
        return Err(refuse(
            "it is a fusion checkpoint, whose front end takes random parts of a song and is not supported\nhint: use \
             the one without fusion, such as 630k-audioset-best.pt for 630k-audioset-fusion-best.pt",
        ));
    }
    if !has("text_branch.embeddings.word_embeddings.") {
        return Err(refuse(
            "its text branch is no RoBERTa\nhint: LAION's published checkpoints have RoBERTa",
        ));
    }
    let dim = |name: &str, axis: usize| -> Result<usize, Error> {
        let size = checkpoint.shape(name).and_then(|shape| shape.get(axis)).copied();
        size.ok_or_else(|| refuse(&format!("tensor `{name}` is missing\nhint: download it again")))
    };
    let count = |prefix: &str, suffix: &str| {
        (0..).take_while(|i| checkpoint.shape(&format!("{prefix}{i}{suffix}")).is_some()).count()
    };
    let n_stages = count("audio_branch.layers.", ".blocks.0.norm1.weight");
    let table = |stage: usize, axis: usize| {
        dim(&format!("audio_branch.layers.{stage}.blocks.0.attn.relative_position_bias_table"), axis)
    };
    let embed_dim = dim(patch, 0)?;
    let width = dim("text_branch.embeddings.word_embeddings.weight", 1)?;
    Ok(Config {
        audio: htsat::Config {
            mel_bins: dim("audio_branch.bn0.weight", 0)?,
            patch_size: dim(patch, 2)?,
            embed_dim,
            depths: (0..n_stages)
                .map(|i| count(&format!("audio_branch.layers.{i}.blocks."), ".norm1.weight"))
                .collect(),
            num_heads: (0..n_stages).map(|i| table(i, 1)).collect::<Result<_, _>>()?,
            window_size: table(0, 0)?.isqrt().div_ceil(2), // (2w - 1)² rows
            mlp_ratio: dim("audio_branch.layers.0.blocks.0.mlp.fc1.weight", 0)? as f64 / embed_dim as f64,
            ..htsat::Config::laion_tiny()
        },
        text: roberta::Config {
            vocab_size: dim("text_branch.embeddings.word_embeddings.weight", 0)?,
            hidden_size: width,
            num_hidden_layers: count("text_branch.encoder.layer.", ".output.dense.weight"),
            num_attention_heads: width / ROBERTA_HEAD_DIM,
            intermediate_size: dim("text_branch.encoder.layer.0.intermediate.dense.weight", 0)?,
            max_position_embeddings: dim("text_branch.embeddings.position_embeddings.weight", 0)?,
            type_vocab_size: dim("text_branch.embeddings.token_type_embeddings.weight", 0)?,
            ..roberta::Config::base()
        },
        joint_dim: dim("audio_projection.2.weight", 0)?,
        max_tokens: MAX_TOKENS,
    })
}

/// Length to which LAION pads and cuts texts. Hugging Face's tokenizer cuts at 512: no caption in use is that long.
const MAX_TOKENS: usize = 77;

/// Hugging Face's `config.json` of a `ClapModel`, with the values of its classes where keys are left out.
#[derive(serde::Deserialize)]
#[serde(default)]
struct HuggingFace {
    audio_config: Audio,
    text_config: Text,
    projection_dim: usize,
}

impl Default for HuggingFace {
    fn default() -> Self {
        Self { audio_config: Audio::default(), text_config: Text::default(), projection_dim: 512 }
    }
}

#[derive(serde::Deserialize)]
#[serde(default)]
struct Audio {
    window_size: usize,
    num_mel_bins: usize,
    spec_size: usize,
    hidden_act: String,
    patch_size: usize,
    patch_stride: [usize; 2],
    depths: Vec<usize>,
    num_attention_heads: Vec<usize>,
    enable_fusion: bool,
    patch_embeds_hidden_size: usize,
    enable_patch_layer_norm: bool,
    qkv_bias: bool,
    mlp_ratio: f64,
    layer_norm_eps: f64,
    projection_hidden_act: String,
}

impl Default for Audio {
    fn default() -> Self {
        Self {
            window_size: 8,
            num_mel_bins: 64,
            spec_size: 256,
            hidden_act: "gelu".into(),
            patch_size: 4,
            patch_stride: [4, 4],
            depths: vec![2, 2, 6, 2],
            num_attention_heads: vec![4, 8, 16, 32],
            enable_fusion: false,
            patch_embeds_hidden_size: 96,
            enable_patch_layer_norm: true,
            qkv_bias: true,
            mlp_ratio: 4.0,
            layer_norm_eps: 1e-5,
            projection_hidden_act: "relu".into(),
        }
    }
}

#[derive(serde::Deserialize)]
#[serde(default)]
struct Text {
    vocab_size: usize,
    hidden_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    intermediate_size: usize,
    hidden_act: String,
    max_position_embeddings: usize,
    type_vocab_size: usize,
    layer_norm_eps: f64,
    pad_token_id: u32,
    position_embedding_type: String,
    projection_hidden_act: String,
}

impl Default for Text {
    fn default() -> Self {
        let base = roberta::Config::base();
        Self {
            vocab_size: base.vocab_size,
            hidden_size: base.hidden_size,
            num_hidden_layers: base.num_hidden_layers,
            num_attention_heads: base.num_attention_heads,
            intermediate_size: base.intermediate_size,
            hidden_act: "gelu".into(),
            max_position_embeddings: base.max_position_embeddings,
            type_vocab_size: base.type_vocab_size,
            layer_norm_eps: 1e-12, // of the class; LAION's RoBERTa has 1e-5
            pad_token_id: base.pad_token_id,
            position_embedding_type: "absolute".into(),
            projection_hidden_act: "relu".into(),
        }
    }
}

/// Hugging Face's `preprocessor_config.json`.
#[derive(serde::Deserialize)]
#[serde(default)]
struct FrontEnd {
    sampling_rate: u32,
    hop_length: usize,
    fft_window_size: usize,
    feature_size: usize,
    frequency_min: f64,
    frequency_max: f64,
    max_length_s: usize,
    truncation: String,
}

impl FrontEnd {
    /// What all checkpoints without fusion have in common.
    fn laion() -> Self {
        let c = htsat::Config::laion_tiny();
        Self {
            sampling_rate: c.sample_rate_hz,
            hop_length: c.hop,
            fft_window_size: c.n_fft,
            feature_size: c.mel_bins,
            frequency_min: c.f_min_hz,
            frequency_max: c.f_max_hz,
            max_length_s: 10,
            truncation: "rand_trunc".into(),
        }
    }
}

impl Default for FrontEnd {
    /// The class's values.
    fn default() -> Self {
        Self { frequency_min: 0.0, truncation: "fusion".into(), ..Self::laion() }
    }
}

impl HuggingFace {
    fn config(&self, front_end: &FrontEnd) -> Result<Config, String> {
        let (audio, text) = (&self.audio_config, &self.text_config);
        if audio.enable_fusion {
            return Err(
                "`audio_config.enable_fusion`: a fusion checkpoint, whose front end takes random parts of a \
                        song and is not supported\nhint: use one without, such as laion/clap-htsat-unfused"
                    .into(),
            );
        }
        let fixed = [
            ("audio_config.hidden_act", "gelu", audio.hidden_act.clone()),
            ("audio_config.projection_hidden_act", "relu", audio.projection_hidden_act.clone()),
            ("audio_config.enable_patch_layer_norm", "true", audio.enable_patch_layer_norm.to_string()),
            ("audio_config.qkv_bias", "true", audio.qkv_bias.to_string()),
            ("audio_config.layer_norm_eps", "0.00001", audio.layer_norm_eps.to_string()),
            ("text_config.hidden_act", "gelu", text.hidden_act.clone()),
            ("text_config.projection_hidden_act", "relu", text.projection_hidden_act.clone()),
            ("text_config.position_embedding_type", "absolute", text.position_embedding_type.clone()),
            // with `fusion` the mel filters are others
            ("truncation of preprocessor_config.json", "rand_trunc", front_end.truncation.clone()),
        ];
        let size = |n: usize| n.to_string();
        let equal = [
            ("audio_config.patch_stride", size(audio.patch_size), size(audio.patch_stride[0])),
            ("audio_config.patch_stride", size(audio.patch_size), size(audio.patch_stride[1])),
            (
                "feature_size of preprocessor_config.json",
                size(audio.num_mel_bins),
                size(front_end.feature_size),
            ),
        ];
        let fixed = fixed.into_iter().map(|(key, want, got)| (key, want.to_string(), got));
        let wrong: Vec<String> = fixed
            .chain(equal)
            .filter(|(_, want, got)| want != got)
            .map(|(key, want, got)| format!("`{key}`: expected {want}, found {got}"))
            .collect();
        if !wrong.is_empty() {
            return Err(wrong.join("\n  "));
        }
        Ok(Config {
            audio: htsat::Config {
                sample_rate_hz: front_end.sampling_rate,
                clip_samples: front_end.sampling_rate as usize * front_end.max_length_s,
                n_fft: front_end.fft_window_size,
                hop: front_end.hop_length,
                mel_bins: audio.num_mel_bins,
                f_min_hz: front_end.frequency_min,
                f_max_hz: front_end.frequency_max,
                spec_size: audio.spec_size,
                patch_size: audio.patch_size,
                embed_dim: audio.patch_embeds_hidden_size,
                depths: audio.depths.clone(),
                num_heads: audio.num_attention_heads.clone(),
                window_size: audio.window_size,
                mlp_ratio: audio.mlp_ratio,
            },
            text: roberta::Config {
                vocab_size: text.vocab_size,
                hidden_size: text.hidden_size,
                num_hidden_layers: text.num_hidden_layers,
                num_attention_heads: text.num_attention_heads,
                intermediate_size: text.intermediate_size,
                max_position_embeddings: text.max_position_embeddings,
                type_vocab_size: text.type_vocab_size,
                layer_norm_eps: text.layer_norm_eps,
                pad_token_id: text.pad_token_id,
            },
            joint_dim: self.projection_dim,
            max_tokens: MAX_TOKENS
                .min(text.max_position_embeddings.saturating_sub(text.pad_token_id as usize + 1)),
        })
    }
}

/// Hugging Face's names of a tensor of ours; query, key and value of the audio branch are three there.
fn hugging_face_names(name: &str) -> Vec<String> {
    if let Some(rest) = name.strip_prefix("text_branch.") {
        return vec![format!("text_model.{rest}")];
    }
    if let Some(rest) = name.strip_prefix("audio_branch.") {
        let rest = [
            ("bn0.", "batch_norm."),
            (".norm1.", ".layernorm_before."),
            (".norm2.", ".layernorm_after."),
            (".attn.proj.", ".attention.output.dense."),
            (".attn.", ".attention.self."),
            (".mlp.fc1.", ".intermediate.dense."),
            (".mlp.fc2.", ".output.dense."),
        ]
        .iter()
        .fold(rest.to_string(), |rest, (ours, theirs)| rest.replace(ours, theirs));
        let parts = if rest.contains(".qkv.") { &["query", "key", "value"][..] } else { &["qkv"] };
        return parts
            .iter()
            .map(|part| format!("audio_model.audio_encoder.{}", rest.replace("qkv", part)))
            .collect();
    }
    vec![name.replace("projection.0.", "projection.linear1.").replace("projection.2.", "projection.linear2.")]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clap::{Clap, ClapEncoder};
    use crate::tokenizer::Tokenizer;
    use candle_core::{DType, Device, Tensor};
    use dragon_testkit::{Golden, Tol, assert_close, fixture};
    use std::fs;

    /// A folder with copies of a fixture's files and a tokenizer.
    fn folder(case: &str, names: &[&str]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for name in names {
            let from = fixture(format!("dragon-encoders/clap/{case}/{name}"));
            fs::copy(from, dir.path().join(name)).unwrap();
        }
        let captions = ["a lively jig on fiddle and flute", "a slow waltz for the church organ"];
        Tokenizer::train(&captions, 60).unwrap().save(dir.path().join("tokenizer.json")).unwrap();
        dir
    }

    const LAION: [&str; 1] = ["checkpoint.pt"];
    const HUGGING_FACE: [&str; 3] = ["config.json", "preprocessor_config.json", "model.safetensors"];

    /// The clips of generate.py.
    fn clips() -> [Vec<f32>; 2] {
        let noise = |i: i64| (i * i * 7 + 131 * i) % 20_001 - 10_000;
        let saw = |i: i64| (i * (220 + i / 4_000) % 48_000 - 24_000).div_euclid(1 + i / 96_000);
        let clip = |f: &dyn Fn(i64) -> i64| (0..480_000).map(|i| f(i) as f32 / 32_768.0).collect();
        [clip(&noise), clip(&saw)]
    }

    fn matches_its_golden_vectors(encoder: &ClapEncoder, case: &str) {
        let golden = Golden::fixture(format!("dragon-encoders/clap/{case}/golden.safetensors"));
        let tol = Tol { atol: 1e-4, rtol: 1e-3 }; // a small model end to end
        let clips = clips();
        let audio = encoder.embed_clips(&[&clips[0], &clips[1]]).unwrap();
        assert_close(&Tensor::new(audio, &Device::Cpu).unwrap(), &golden.get("audio_embedding"), tol);
        let text = encoder.model.embed_tokens(&golden.get("ids"), &golden.get("mask")).unwrap();
        assert_close(&text, &golden.get("text_embedding"), tol);
    }

    #[test]
    fn a_checkpoint_of_laion_gives_laions_embeddings() {
        let dir = folder("laion", &LAION);
        for path in [dir.path().to_path_buf(), dir.path().join("checkpoint.pt")] {
            let encoder = ClapEncoder::load(&path, &Device::Cpu).unwrap();
            matches_its_golden_vectors(&encoder, "laion");
        }
    }

    #[test]
    fn a_folder_of_hugging_face_gives_its_embeddings_and_keeps_its_id_in_our_layout() {
        let dir = folder("huggingface", &HUGGING_FACE);
        let encoder = ClapEncoder::load(dir.path(), &Device::Cpu).unwrap();
        matches_its_golden_vectors(&encoder, "huggingface");
        encoder.save(dir.path().join("ours")).unwrap();
        let ours = ClapEncoder::load(dir.path().join("ours"), &Device::Cpu).unwrap();
        matches_its_golden_vectors(&ours, "huggingface");
        use crate::AudioEncoder;
        assert_eq!(ours.id(), encoder.id());
    }

    #[test]
    fn the_files_of_each_layout_are_known() {
        let names = |dir: &Path| -> Vec<String> {
            let files = files(dir).unwrap();
            files.iter().map(|f| f.file_name().unwrap().to_string_lossy().into_owned()).collect()
        };
        assert_eq!(names(folder("laion", &LAION).path()), ["checkpoint.pt", "tokenizer.json"]);
        let dir = folder("huggingface", &HUGGING_FACE);
        let all = ["model.safetensors", "config.json", "preprocessor_config.json", "tokenizer.json"];
        assert_eq!(names(dir.path()), all);
    }

    /// Names and shapes of a published checkpoint.
    fn shapes(name: &str) -> Vec<(String, Vec<usize>)> {
        let path = fixture(format!("dragon-encoders/clap/{name}.shapes"));
        let line = |line: &str| {
            let (name, sizes) = line.split_once('\t').unwrap();
            (
                name.to_string(),
                sizes.split(',').filter(|s| !s.is_empty()).map(|s| s.parse().unwrap()).collect(),
            )
        };
        fs::read_to_string(path).unwrap().lines().map(line).collect()
    }

    #[test]
    fn every_tensor_of_the_published_checkpoints_is_read_or_known_to_be_unneeded() {
        for (name, layout) in [
            ("music_audioset_epoch_15_esc_90.14", Layout::Laion),
            ("630k-audioset-best", Layout::Laion),
            ("clap-htsat-unfused", Layout::HuggingFace(Config::laion_base())),
        ] {
            let config = match layout {
                Layout::Laion => laion_config(&Checkpoint::without_data(shapes(name))).unwrap(),
                _ => HuggingFace::default().config(&FrontEnd::laion()).unwrap(),
            };
            let mut want = Config::laion_base();
            if !name.starts_with("music") {
                want.audio = htsat::Config::laion_tiny();
            }
            if !matches!(layout, Layout::Laion) {
                want.text.layer_norm_eps = 1e-12;
            }
            assert_eq!(config, want, "{name}");
            let loader = layout.loader(Checkpoint::without_data(shapes(name)));
            Clap::new(&config, loader.builder(DType::F32, &Device::Cpu)).unwrap();
            loader.finish(|tensor| layout.is_unneeded(tensor)).unwrap();
        }
    }

    #[test]
    fn what_cannot_be_loaded_says_why_and_what_to_do() {
        let message = |path: &Path| ClapEncoder::load(path, &Device::Cpu).err().unwrap().to_string();
        let dir = folder("laion", &LAION);
        fs::remove_file(dir.path().join("tokenizer.json")).unwrap();
        let text = message(dir.path());
        assert!(text.contains("tokenizer.json` cannot be read: it is missing\nhint: put"), "{text}");

        let of = |names: &[&str]| {
            let list = names.iter().map(|name| (name.to_string(), vec![8, 1, 4, 4]));
            laion_config(&Checkpoint::without_data(list)).unwrap_err().to_string()
        };
        let patch = "audio_branch.patch_embed.proj.weight";
        for (text, part) in [
            (of(&["encoder.layers.0.weight"]), "holds no CLAP"),
            (of(&["audio_branch.conv_block1.conv1.weight"]), "no HTSAT"),
            (of(&["audio_model.audio_encoder.norm.bias"]), "Hugging Face's names"),
            (of(&[patch, "audio_branch.patch_embed.mel_conv2d.weight"]), "a fusion checkpoint"),
            (of(&[patch, "text_branch.resblocks.0.ln_1.weight"]), "no RoBERTa"),
            (
                of(&[patch, "text_branch.embeddings.word_embeddings.weight"]),
                "`audio_branch.bn0.weight` is missing",
            ),
        ] {
            assert!(text.contains(part) && text.contains("hint: "), "{text}");
        }

        let dir = folder("huggingface", &HUGGING_FACE);
        let config = fs::read_to_string(dir.path().join("config.json")).unwrap();
        let change = |from: &str, to: &str| {
            assert!(config.contains(from));
            fs::write(dir.path().join("config.json"), config.replace(from, to)).unwrap();
            message(dir.path())
        };
        assert!(
            change("\"enable_fusion\": false", "\"enable_fusion\": true").contains("a fusion checkpoint")
        );
        let text = change("\"qkv_bias\": true", "\"qkv_bias\": false");
        assert!(text.contains("`audio_config.qkv_bias`: expected true, found false"), "{text}");
        let text = change("\"patch_embeds_hidden_size\": 8", "\"patch_embeds_hidden_size\": 16");
        assert!(
            text.contains("`audio_model.audio_encoder.layers.0.blocks.0.attention.self.key.weight`: expected [16, 16], found [8, 8]"),
            "{text}"
        );
    }

    #[test]
    fn a_collapsed_text_branch_is_told_from_one_that_works() {
        let dir = folder("huggingface", &HUGGING_FACE);
        let cosine = || ClapEncoder::load(dir.path(), &Device::Cpu).unwrap().text_cosine().unwrap();
        let working = cosine();
        assert!(working < crate::clap::COLLAPSED_COSINE, "{working}");
        // without weights in the first layer of its head, every text gives the same
        let path = dir.path().join("model.safetensors");
        let mut tensors = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
        let first = tensors.get_mut("text_projection.linear1.weight").unwrap();
        *first = first.zeros_like().unwrap();
        candle_core::safetensors::save(&tensors, &path).unwrap();
        let collapsed = cosine();
        assert!((collapsed - 1.0).abs() < 1e-5, "{collapsed}");
    }
}
