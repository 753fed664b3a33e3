//! Low-rank adapters (Hu et al. 2021, arXiv:2106.09685): a [`Linear`](crate::Linear) with one computes
//! `x Wᵀ + (alpha / rank) x Aᵀ Bᵀ`, where `W` stays as it is.
//!
//! Names, shapes, initial values and files are those of the Python package peft: `lora_A.weight` `[rank, in]`, uniform in
//! `±1/sqrt(in)`; `lora_B.weight` `[out, rank]`, zeros, so that a new adapter changes nothing.

use crate::{Checkpoint, LoadError, Params, write_atomically, write_safetensors};
use candle_core::{DType, Device, Result, Shape, Tensor, bail};
use candle_nn::VarBuilder;
use candle_nn::init::Init;
use candle_nn::var_builder::SimpleBackend;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

/// Files of a folder of adapters.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// See [`CONFIG_FILE`].
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";
/// What peft puts before the names of a model's layers.
const PREFIX: &str = "base_model.model.";

/// Size and place of adapters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoraConfig {
    /// Rank of the change of a weight, at least 1.
    pub rank: usize,
    /// The change is scaled by `alpha / rank`.
    pub alpha: f64,
    /// Layers that get an adapter: those whose name is one of these, or ends in a dot and one of these.
    pub targets: Vec<String>,
}

impl LoraConfig {
    /// Says what is wrong with the config, if anything.
    ///
    /// # Errors
    /// If the rank is 0, `alpha` is not a number above 0, or there is no target.
    pub fn check(&self) -> Result<()> {
        if self.rank == 0 {
            bail!("`rank`: expected at least 1, found 0");
        }
        if !(self.alpha.is_finite() && self.alpha > 0.0) {
            bail!("`alpha`: expected a number above 0, found {}", self.alpha);
        }
        if self.targets.is_empty() {
            bail!("`targets`: expected names of linear layers, found none");
        }
        Ok(())
    }

    fn is_target(&self, layer: &str) -> bool {
        let ends = |target: &String| layer.strip_suffix(target.as_str());
        self.targets.iter().filter_map(ends).any(|before| before.is_empty() || before.ends_with('.'))
    }
}

/// The adapters of a model. Clones share their variables.
#[derive(Clone)]
pub struct Lora {
    cfg: LoraConfig,
    params: Params,
}

impl Lora {
    /// No adapters yet: a model that is built [`over`](Self::over) them creates them, with noise from `seed` and their names.
    ///
    /// # Errors
    /// As [`LoraConfig::check`].
    pub fn new(cfg: LoraConfig, seed: u64) -> Result<Self> {
        cfg.check()?;
        Ok(Self { cfg, params: Params::new(seed) })
    }

    /// Size and place.
    pub fn config(&self) -> &LoraConfig {
        &self.cfg
    }

    /// The variables: `LAYER.lora_A.weight` and `LAYER.lora_B.weight`.
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// What a model with adapters is built from: tensors of `base`, and the variables.
    pub fn over(&self, base: VarBuilder<'static>) -> VarBuilder<'static> {
        self.overlay(base, false)
    }

    /// As [`Self::over`], with the variables' values, so that nothing keeps a history.
    pub fn frozen_over(&self, base: VarBuilder<'static>) -> VarBuilder<'static> {
        self.overlay(base, true)
    }

    fn overlay(&self, base: VarBuilder<'static>, frozen: bool) -> VarBuilder<'static> {
        let (dtype, device) = (base.dtype(), base.device().clone());
        VarBuilder::from_backend(Box::new(Overlay { base, lora: self.clone(), frozen }), dtype, device)
    }

    /// The same adapters with other variables of the same names: their averages.
    pub fn with(&self, params: Params) -> Self {
        Self { params, ..self.clone() }
    }

    /// Writes a folder as peft does: `adapter_config.json` and `adapter_model.safetensors`, in f32. The config goes last.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn save(&self, dir: &Path) -> Result<()> {
        let renamed = |(name, tensor): (String, Tensor)| (format!("{PREFIX}{name}"), tensor);
        let tensors: BTreeMap<String, Tensor> = self.params.tensors()?.into_iter().map(renamed).collect();
        write_safetensors(
            dir.join(WEIGHTS_FILE),
            &tensors,
            &BTreeMap::from([("format".into(), "pt".into())]),
        )?;
        let json = json!({
            "peft_type": "LORA",
            "base_model_name_or_path": null,
            "r": self.cfg.rank,
            "lora_alpha": self.cfg.alpha,
            "target_modules": self.cfg.targets,
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": false,
            "use_rslora": false,
            "use_dora": false,
            "inference_mode": true,
        });
        let text = serde_json::to_vec_pretty(&json).map_err(candle_core::Error::wrap)?;
        Ok(write_atomically(&dir.join(CONFIG_FILE), &text)?)
    }

    /// Reads the config in a folder of adapters; [`Self::load`] reads the weights, once a model was built.
    ///
    /// # Errors
    /// If the file is missing or broken, or describes adapters of another kind.
    pub fn read_config(dir: &Path) -> Result<LoraConfig> {
        let path = dir.join(CONFIG_FILE);
        let wrong = |problem: String| candle_core::Error::msg(format!("`{}`: {problem}", path.display()));
        let text = std::fs::read(&path).map_err(|err| wrong(err.to_string()))?;
        let json: Value = serde_json::from_slice(&text).map_err(|err| wrong(err.to_string()))?;
        for (key, want) in [("peft_type", json!("LORA")), ("bias", json!("none"))] {
            if json[key] != want {
                return Err(wrong(format!("`{key}`: expected {want}, found {}", json[key])));
            }
        }
        for key in ["use_rslora", "use_dora", "fan_in_fan_out"] {
            if json[key] == json!(true) {
                return Err(wrong(format!("`{key}`: adapters of this kind are not built here")));
            }
        }
        let targets = json["target_modules"]
            .as_array()
            .ok_or_else(|| wrong("`target_modules`: expected a list".into()))?;
        let cfg = LoraConfig {
            rank: json["r"].as_u64().unwrap_or(0) as usize,
            alpha: json["lora_alpha"].as_f64().unwrap_or(f64::NAN),
            targets: targets.iter().filter_map(|name| Some(name.as_str()?.to_owned())).collect(),
        };
        cfg.check().map_err(|err| wrong(err.to_string()))?;
        Ok(cfg)
    }

    /// Fills the adapters from a folder. A model must have been built over them, so that they exist.
    ///
    /// # Errors
    /// If the file is missing or broken, or names or shapes differ (all are listed).
    pub fn load(&self, dir: &Path) -> std::result::Result<(), LoadError> {
        let path = dir.join(WEIGHTS_FILE);
        let checkpoint = Checkpoint::open(&path)?;
        let mut tensors = HashMap::new();
        for name in checkpoint.names() {
            // diffusers writes the part of its pipeline instead.
            let layer = name.strip_prefix(PREFIX).or(name.strip_prefix("transformer.")).unwrap_or(name);
            let tensor = checkpoint.read(name, DType::F32, &Device::Cpu);
            let tensor = tensor
                .map_err(|source| LoadError::Unreadable { path: path.clone(), source: source.into() })?;
            tensors.insert(layer.to_owned(), tensor);
        }
        self.params.fill(&tensors, "", &path)
    }
}

/// The adapter of one layer.
#[derive(Debug, Clone)]
pub(crate) struct Adapter {
    /// `[rank, in]`.
    a: Tensor,
    /// `[out, rank]`.
    b: Tensor,
    scale: f64,
}

/// Under this name [`Overlay`] tells a layer the rank and the scale of its adapter.
const SETTING: &str = "lora_setting";

impl Adapter {
    /// That of the layer `vb`, if it has one.
    pub fn read(n_in: usize, n_out: usize, vb: &VarBuilder) -> Result<Option<Self>> {
        if !vb.contains_tensor(SETTING) {
            return Ok(None);
        }
        let setting = vb.get_unchecked_dtype(SETTING, DType::F64)?.to_vec1::<f64>()?;
        let (rank, scale) = (setting[0] as usize, setting[1]);
        let bound = 1.0 / (n_in.max(1) as f64).sqrt();
        let uniform = Init::Uniform { lo: -bound, up: bound };
        Ok(Some(Self {
            a: vb.pp("lora_A").get_with_hints((rank, n_in), "weight", uniform)?,
            b: vb.pp("lora_B").get_with_hints((n_out, rank), "weight", Init::Const(0.0))?,
            scale,
        }))
    }

    /// What it adds to the layer's output for `x`, `[..., in]` to `[..., out]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        crate::linear(&(crate::linear(x, &self.a, None)? * self.scale)?, &self.b, None)
    }
}

/// A model's tensors with adapters beside them.
struct Overlay {
    base: VarBuilder<'static>,
    lora: Lora,
    frozen: bool,
}

fn is_adapter(name: &str) -> bool {
    name.ends_with(".lora_A.weight") || name.ends_with(".lora_B.weight")
}

impl SimpleBackend for Overlay {
    fn get(&self, s: Shape, name: &str, h: Init, dtype: DType, dev: &Device) -> Result<Tensor> {
        if !is_adapter(name) {
            return self.base.get_with_hints_dtype(s, name, h, dtype);
        }
        // Variables are f32 whatever the base is: steps of an optimiser vanish in bf16.
        let tensor = SimpleBackend::get(&self.lora.params, s, name, h, DType::F32, dev)?;
        if self.frozen { tensor.detach().to_dtype(dtype) } else { tensor.to_dtype(dtype) }
    }

    fn get_unchecked(&self, name: &str, dtype: DType, dev: &Device) -> Result<Tensor> {
        if name.ends_with(SETTING) {
            let cfg = &self.lora.cfg;
            return Tensor::new(&[cfg.rank as f64, cfg.alpha / cfg.rank as f64], &Device::Cpu);
        }
        if is_adapter(name) {
            return SimpleBackend::get_unchecked(&self.lora.params, name, dtype, dev);
        }
        self.base.get_unchecked_dtype(name, dtype)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        match name.strip_suffix(SETTING).and_then(|layer| layer.strip_suffix('.')) {
            Some(layer) => self.lora.cfg.is_target(layer),
            None => self.base.contains_tensor(name),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Linear, Rng};
    use candle_core::Module;

    const CPU: Device = Device::Cpu;

    fn config() -> LoraConfig {
        LoraConfig { rank: 2, alpha: 4.0, targets: vec!["q".into(), "out.0".into()] }
    }

    /// Two layers over a frozen base, of which `a.q` is a target.
    fn layers(vb: VarBuilder) -> (Linear, Linear) {
        let layer = |name: &str| Linear::no_bias(3, 4, vb.pp("a").pp(name)).unwrap();
        (layer("q"), layer("v"))
    }

    fn base() -> VarBuilder<'static> {
        let params = Params::new(1);
        layers(params.builder(DType::F32, &CPU));
        let tensors = params.tensors().unwrap().into_iter().collect();
        VarBuilder::from_tensors(tensors, DType::F32, &CPU)
    }

    fn input() -> Tensor {
        Rng::new(3).normal_tensor((5, 3), DType::F32, &CPU).unwrap()
    }

    fn flat(t: &Tensor) -> Vec<f32> {
        t.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn only_targets_get_an_adapter_which_changes_nothing_at_first() {
        let lora = Lora::new(config(), 7).unwrap();
        let (q, v) = layers(lora.over(base()));
        let (plain_q, plain_v) = layers(base());
        assert_eq!(flat(&q.forward(&input()).unwrap()), flat(&plain_q.forward(&input()).unwrap()));
        assert_eq!(flat(&v.forward(&input()).unwrap()), flat(&plain_v.forward(&input()).unwrap()));
        let names: Vec<String> = lora.params().names_and_vars().into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["a.q.lora_A.weight", "a.q.lora_B.weight"]);
        assert!(flat(lora.params().get("a.q.lora_A.weight").unwrap().as_tensor()).iter().all(|x| *x != 0.0));
        let cfg = config();
        assert!(
            cfg.is_target("b.out.0") && cfg.is_target("q") && !cfg.is_target("bq") && !cfg.is_target("out")
        );
    }

    #[test]
    fn an_adapter_adds_its_product_and_alone_is_trained() {
        let lora = Lora::new(config(), 7).unwrap();
        let (q, _) = layers(lora.over(base()));
        let b = lora.params().get("a.q.lora_B.weight").unwrap();
        b.set(&Rng::new(4).normal_tensor((4, 2), DType::F32, &CPU).unwrap()).unwrap();
        let a = lora.params().get("a.q.lora_A.weight").unwrap();
        let (plain, _) = layers(base());
        let merged = (&plain.weight + (b.as_tensor().matmul(a.as_tensor()).unwrap() * 2.0).unwrap()).unwrap();
        let want = input().matmul(&merged.t().unwrap()).unwrap();
        let got = q.forward(&input()).unwrap();
        for (g, w) in flat(&got).into_iter().zip(flat(&want)) {
            assert!((g - w).abs() < 1e-5, "{g} {w}");
        }
        let grads = crate::backward(&got.sqr().unwrap().sum_all().unwrap()).unwrap();
        assert!(grads.get(&a).is_some() && grads.get(&b).is_some());
        let (frozen, _) = layers(lora.frozen_over(base()));
        let same = frozen.forward(&input()).unwrap();
        assert_eq!(flat(&same), flat(&got));
        assert!(!same.track_op());
    }

    #[test]
    fn a_folder_of_adapters_round_trips_and_a_wrong_one_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (one, other) = (Lora::new(config(), 1).unwrap(), Lora::new(config(), 2).unwrap());
        layers(one.over(base()));
        layers(other.over(base()));
        one.save(dir.path()).unwrap();
        assert_eq!(Lora::read_config(dir.path()).unwrap(), config());
        other.load(dir.path()).unwrap();
        let a = |lora: &Lora| flat(lora.params().get("a.q.lora_A.weight").unwrap().as_tensor());
        assert_eq!(a(&one), a(&other));
        let names: Vec<String> =
            Checkpoint::open(dir.path().join(WEIGHTS_FILE)).unwrap().names().map(str::to_owned).collect();
        assert_eq!(names[0], "base_model.model.a.q.lora_A.weight");

        let wider = Lora::new(LoraConfig { rank: 3, ..config() }, 2).unwrap();
        layers(wider.over(base()));
        let message = wider.load(dir.path()).unwrap_err().to_string();
        assert!(message.contains("`a.q.lora_A.weight`: expected [3, 3], found [2, 3]"), "{message}");
        std::fs::write(dir.path().join(CONFIG_FILE), r#"{"peft_type": "LOHA"}"#).unwrap();
        assert!(Lora::read_config(dir.path()).unwrap_err().to_string().contains("LOHA"));
        for cfg in [
            LoraConfig { rank: 0, ..config() },
            LoraConfig { alpha: 0.0, ..config() },
            LoraConfig { targets: Vec::new(), ..config() },
        ] {
            assert!(Lora::new(cfg, 0).is_err());
        }
    }
}
