//! Text to token ids: reads a `tokenizer.json`, or trains a small one on captions, and pads batches.
//!
//! A tokenizer trained here serves both text models of the tiny preset (T5 and the CLAP text branch): lower-cased
//! NFKC text, split at white space and punctuation, byte-pair merges, and RoBERTa's frame `<s> … </s>` with RoBERTa's
//! ids ([`BOS_ID`], [`PAD_ID`], [`EOS_ID`], [`UNK_ID`]). Training is deterministic: ties between merges are broken by id.

use candle_core::{Device, Tensor};
use std::path::{Path, PathBuf};
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::models::{ModelWrapper, TrainerWrapper};
use tokenizers::normalizers::{NFKC, Sequence, utils::Lowercase};
use tokenizers::pre_tokenizers::whitespace::Whitespace;
use tokenizers::processors::roberta::RobertaProcessing;
use tokenizers::{AddedToken, TruncationDirection};

/// Id of `<s>`, the first token of every text, in tokenizers made by [`Tokenizer::train`].
pub const BOS_ID: u32 = 0;
/// Id of `<pad>` in tokenizers made by [`Tokenizer::train`].
pub const PAD_ID: u32 = 1;
/// Id of `</s>`, the last token of every text, in tokenizers made by [`Tokenizer::train`].
pub const EOS_ID: u32 = 2;
/// Id of `<unk>`, a character never seen in training, in tokenizers made by [`Tokenizer::train`].
pub const UNK_ID: u32 = 3;
/// The special tokens in the order of their ids.
const SPECIAL_TOKENS: [&str; 4] = ["<s>", "<pad>", "</s>", "<unk>"];

/// What goes wrong between a text and its ids.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file is missing or is no tokenizer.
    #[error("tokenizer `{}` cannot be read: {reason}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the reader said.
        reason: String,
    },
    /// The file could not be written.
    #[error("tokenizer `{}` cannot be written: {reason}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the writer said.
        reason: String,
    },
    /// The tokenizer has no padding token, so batches cannot be formed.
    #[error("the tokenizer has no `<pad>` token; expected one among its added tokens or its vocabulary")]
    NoPadToken,
    /// A caption without a single visible character.
    #[error("caption {index} is empty; give it words, or drop it from the manifest")]
    EmptyText {
        /// Position of the caption in the batch, from 0.
        index: usize,
    },
    /// A caption longer than the model reads, where [`TooLong::Error`] was asked for.
    #[error(
        "caption {index} has {n_tokens} tokens, the model reads {max_tokens}: {text:?}; shorten it, or allow truncation"
    )]
    TooLong {
        /// Position of the caption in the batch, from 0.
        index: usize,
        /// Its tokens, special ones included.
        n_tokens: usize,
        /// The limit, special tokens included.
        max_tokens: usize,
        /// The caption.
        text: String,
    },
    /// No captions, or a vocabulary too small to hold the special tokens and the alphabet.
    #[error("cannot train a tokenizer: {reason}")]
    Train {
        /// Why.
        reason: String,
    },
    /// The tokenizer library refused a text.
    #[error("caption {index} cannot be tokenised: {reason}")]
    Encode {
        /// Position of the caption in the batch, from 0.
        index: usize,
        /// What the library said.
        reason: String,
    },
    /// Making the tensors failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

/// What to do with a text that has more tokens than the model reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TooLong {
    /// Keep the first tokens and the final special token; [`Tokens::truncated`] lists the texts, for a warning.
    Truncate,
    /// Refuse the batch.
    Error,
}

/// A padded batch of texts.
#[derive(Debug, Clone)]
pub struct Tokens {
    /// `[B, L]` u32 token ids; unused places hold the padding id.
    pub ids: Tensor,
    /// `[B, L]` f32: 1 on tokens, 0 on padding.
    pub mask: Tensor,
    /// Positions in the batch of the texts that were cut at the limit.
    pub truncated: Vec<usize>,
}

/// Text to ids.
#[derive(Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    pad_id: u32,
}

impl Tokenizer {
    /// Reads a `tokenizer.json`. Truncation and padding set in the file are switched off: the caller decides both.
    ///
    /// # Errors
    /// If the file is missing, is not a tokenizer, or has no `<pad>` token.
    pub fn load(path: impl AsRef<Path>) -> Result<Self, Error> {
        let path = path.as_ref();
        let bytes =
            std::fs::read(path).map_err(|e| Error::Read { path: path.into(), reason: e.to_string() })?;
        let inner = tokenizers::Tokenizer::from_bytes(&bytes)
            .map_err(|e| Error::Read { path: path.into(), reason: e.to_string() })?;
        Self::from_inner(inner)
    }

    /// Trains byte-pair merges on captions until the vocabulary has `vocab_size` entries or no pair occurs twice.
    /// Special tokens and alphabet count, so [`Self::vocab_size`] may come out smaller than asked, never larger.
    ///
    /// # Errors
    /// If there is no caption with visible text, or `vocab_size` cannot hold the special tokens and the alphabet.
    pub fn train<S: AsRef<str>>(captions: &[S], vocab_size: usize) -> Result<Self, Error> {
        let fail = |reason: String| Error::Train { reason };
        if captions.iter().all(|c| c.as_ref().trim().is_empty()) {
            return Err(fail("no caption holds any text".into()));
        }
        let bpe = BPE::builder().unk_token(SPECIAL_TOKENS[UNK_ID as usize].into()).build();
        let mut inner = tokenizers::Tokenizer::new(bpe.map_err(|e| fail(e.to_string()))?);
        let normalizer = Sequence::new(vec![NFKC.into(), Lowercase.into()]);
        inner.with_normalizer(Some(normalizer)).map_err(|e| fail(e.to_string()))?;
        inner.with_pre_tokenizer(Some(Whitespace {}));
        let frame = |id: u32| (SPECIAL_TOKENS[id as usize].to_string(), id);
        inner.with_post_processor(Some(
            RobertaProcessing::new(frame(EOS_ID), frame(BOS_ID)).trim_offsets(false).add_prefix_space(false),
        ));
        let mut trainer: TrainerWrapper = BpeTrainerBuilder::new()
            .vocab_size(vocab_size)
            .min_frequency(2) // a merge seen once is a memory of one caption
            .show_progress(false)
            .special_tokens(SPECIAL_TOKENS.iter().map(|t| AddedToken::from(*t, true)).collect())
            .build()
            .into();
        let texts: Vec<String> = captions.iter().map(|c| c.as_ref().to_string()).collect();
        inner.train(&mut trainer, texts.iter()).map_err(|e| fail(e.to_string()))?;
        let found = inner.get_vocab_size(true);
        if found > vocab_size {
            return Err(fail(format!(
                "expected at most {vocab_size} entries, but special tokens and characters alone are {found}"
            )));
        }
        Self::from_inner(inner)
    }

    fn from_inner(mut inner: tokenizers::Tokenizer) -> Result<Self, Error> {
        inner.with_padding(None);
        inner.with_truncation(None).expect("switching truncation off needs no limit");
        let pad_id = inner.token_to_id("<pad>").ok_or(Error::NoPadToken)?;
        Ok(Self { inner, pad_id })
    }

    /// Writes `tokenizer.json`, whole or not at all.
    ///
    /// # Errors
    /// If the folder is missing, read-only or full.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<(), Error> {
        let path = path.as_ref();
        let fail = |reason: String| Error::Write { path: path.into(), reason };
        dragon_nn::write_atomically(path, self.to_json().as_bytes()).map_err(|e| fail(e.to_string()))
    }

    /// The content of `tokenizer.json`.
    pub fn to_json(&self) -> String {
        self.inner.to_string(true).expect("a tokenizer that was read or trained can be written")
    }

    /// Entries of the vocabulary, special tokens included: the smallest `vocab_size` a model may have.
    pub fn vocab_size(&self) -> usize {
        let ids = self.inner.get_vocab(true);
        ids.values().max().map_or(0, |&id| id as usize + 1)
    }

    /// Id of the padding token.
    pub fn pad_id(&self) -> u32 {
        self.pad_id
    }

    /// Whether the model is a byte-pair encoder (as made by [`Self::train`]) rather than a unigram or word model.
    pub fn is_bpe(&self) -> bool {
        matches!(self.inner.get_model(), ModelWrapper::BPE(_))
    }

    /// Ids of one text with the tokenizer's special tokens, not padded; `true` if it was cut to `max_tokens`.
    ///
    /// # Errors
    /// As [`Self::encode_batch`]; `index` in the message is 0.
    pub fn encode(
        &self,
        text: &str,
        max_tokens: usize,
        too_long: TooLong,
    ) -> Result<(Vec<u32>, bool), Error> {
        self.encode_at(0, text, max_tokens, too_long)
    }

    fn encode_at(
        &self,
        index: usize,
        text: &str,
        max_tokens: usize,
        too_long: TooLong,
    ) -> Result<(Vec<u32>, bool), Error> {
        if text.trim().is_empty() {
            return Err(Error::EmptyText { index });
        }
        let fail = |e: tokenizers::Error| Error::Encode { index, reason: e.to_string() };
        let mut words = self.inner.encode(text, false).map_err(fail)?;
        let n_words = words.len();
        let whole = self.inner.post_process(words.clone(), None, true).map_err(fail)?;
        let n_tokens = whole.len();
        if n_tokens <= max_tokens {
            return Ok((whole.get_ids().to_vec(), false));
        }
        let n_special = n_tokens - n_words;
        if too_long == TooLong::Error || max_tokens <= n_special {
            return Err(Error::TooLong { index, n_tokens, max_tokens, text: text.into() });
        }
        words.truncate(max_tokens - n_special, 0, TruncationDirection::Right);
        let cut = self.inner.post_process(words, None, true).map_err(fail)?;
        Ok((cut.get_ids().to_vec(), true))
    }

    /// Ids and mask of a batch, every row padded to `max_tokens` (so that a text's row never depends on its batch).
    ///
    /// # Errors
    /// If a text is empty, or has more than `max_tokens` tokens and `too_long` is [`TooLong::Error`].
    pub fn encode_batch<S: AsRef<str>>(
        &self,
        texts: &[S],
        max_tokens: usize,
        too_long: TooLong,
        device: &Device,
    ) -> Result<Tokens, Error> {
        let mut ids = vec![self.pad_id; texts.len() * max_tokens];
        let mut mask = vec![0f32; texts.len() * max_tokens];
        let mut truncated = vec![];
        for (index, text) in texts.iter().enumerate() {
            let (row, cut) = self.encode_at(index, text.as_ref(), max_tokens, too_long)?;
            if cut {
                truncated.push(index);
            }
            let start = index * max_tokens;
            ids[start..start + row.len()].copy_from_slice(&row);
            mask[start..start + row.len()].fill(1.0);
        }
        let shape = (texts.len(), max_tokens);
        Ok(Tokens {
            ids: Tensor::from_vec(ids, shape, device)?,
            mask: Tensor::from_vec(mask, shape, device)?,
            truncated,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn captions() -> Vec<String> {
        let tunes = ["jig", "reel", "hornpipe", "waltz", "slip jig"];
        let instruments = ["violin", "flute", "acoustic guitar", "church organ", "harp"];
        let keys = ["D major", "A minor", "G major", "F# minor"];
        let mut out = vec![];
        for (i, t) in tunes.iter().enumerate() {
            for (j, ins) in instruments.iter().enumerate() {
                let key = keys[(i + j) % keys.len()];
                out.push(format!("A lively {t} in {key}, played on {ins} at {} bpm.", 80 + 7 * (i + j)));
            }
        }
        out
    }

    #[test]
    fn special_tokens_have_the_ids_of_roberta() {
        let tk = Tokenizer::train(&captions(), 300).unwrap();
        for (id, token) in SPECIAL_TOKENS.iter().enumerate() {
            assert_eq!(tk.inner.token_to_id(token), Some(id as u32));
        }
        let (ids, cut) = tk.encode("a lively jig", 16, TooLong::Error).unwrap();
        assert_eq!((ids[0], *ids.last().unwrap(), cut), (BOS_ID, EOS_ID, false));
        assert!(
            tk.is_bpe() && tk.vocab_size() <= 300 && ids.iter().all(|&id| (id as usize) < tk.vocab_size())
        );
    }

    #[test]
    fn training_twice_gives_the_same_file_and_a_saved_one_gives_the_same_ids() {
        let a = Tokenizer::train(&captions(), 200).unwrap();
        let b = Tokenizer::train(&captions(), 200).unwrap();
        assert_eq!(a.inner.to_string(false).unwrap(), b.inner.to_string(false).unwrap());
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokenizer.json");
        a.save(&path).unwrap();
        let c = Tokenizer::load(&path).unwrap();
        for text in captions() {
            assert_eq!(
                a.encode(&text, 64, TooLong::Error).unwrap(),
                c.encode(&text, 64, TooLong::Error).unwrap()
            );
        }
    }

    #[test]
    fn unknown_characters_become_unk_and_case_does_not_matter() {
        let tk = Tokenizer::train(&captions(), 300).unwrap();
        let (ids, _) = tk.encode("汉", 8, TooLong::Error).unwrap();
        assert_eq!(ids, [BOS_ID, UNK_ID, EOS_ID]);
        let lower = tk.encode("a jig on flute", 16, TooLong::Error).unwrap();
        assert_eq!(lower, tk.encode("A  JIG on Flute", 16, TooLong::Error).unwrap());
    }

    #[test]
    fn a_long_caption_is_cut_with_its_end_token_or_refused() {
        let tk = Tokenizer::train(&captions(), 300).unwrap();
        let texts =
            ["a jig", "a lively jig in D major played on violin and flute and harp and organ and guitar"];
        let tokens = tk.encode_batch(&texts, 8, TooLong::Truncate, &Device::Cpu).unwrap();
        assert_eq!(tokens.truncated, [1]);
        let rows: Vec<Vec<u32>> = tokens.ids.to_vec2().unwrap();
        assert_eq!((rows[1][0], rows[1][7]), (BOS_ID, EOS_ID));
        let mask: Vec<Vec<f32>> = tokens.mask.to_vec2().unwrap();
        for (row, mask) in rows[0].iter().zip(&mask[0]) {
            assert_eq!(*row == PAD_ID, *mask == 0.0);
        }
        let message = tk.encode_batch(&texts, 8, TooLong::Error, &Device::Cpu).unwrap_err().to_string();
        assert!(message.starts_with("caption 1 has ") && message.contains("the model reads 8"), "{message}");
    }

    #[test]
    fn a_unigram_tokenizer_of_t5_reads_and_takes_the_likeliest_pieces() {
        let special = |id: u32, content: &str| {
            format!(
                r#"{{"id": {id}, "content": "{content}", "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true}}"#
            )
        };
        let specials = [special(0, "<pad>"), special(1, "</s>"), special(2, "<unk>")].join(", ");
        let json = format!(
            r#"{{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [{specials}],
            "normalizer": null, "decoder": null,
            "pre_tokenizer": {{"type": "Sequence", "pretokenizers": [{{"type": "WhitespaceSplit"}},
                {{"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true}}]}},
            "post_processor": {{"type": "TemplateProcessing", "single": [{{"Sequence": {{"id": "A", "type_id": 0}}}},
                {{"SpecialToken": {{"id": "</s>", "type_id": 0}}}}], "pair": [{{"Sequence": {{"id": "A", "type_id": 0}}}},
                {{"Sequence": {{"id": "B", "type_id": 0}}}}],
                "special_tokens": {{"</s>": {{"id": "</s>", "ids": [1], "tokens": ["</s>"]}}}}}},
            "model": {{"type": "Unigram", "unk_id": 2, "byte_fallback": false, "vocab": [["<pad>", 0], ["</s>", 0],
                ["<unk>", 0], ["▁a", -2.0], ["▁slow", -3.0], ["▁wal", -4.0], ["tz", -4.0], ["▁w", -4.5], ["altz", -4.0],
                ["▁", -9.0]]}}}}"#
        );
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokenizer.json");
        std::fs::write(&path, json).unwrap();
        let tk = Tokenizer::load(&path).unwrap();
        assert!(!tk.is_bpe() && tk.pad_id() == 0);
        // `▁wal tz` (-8.0) is likelier than `▁w altz` (-8.5)
        assert_eq!(tk.encode("a  slow waltz", 16, TooLong::Error).unwrap(), (vec![3, 4, 5, 6, 1], false));
        assert_eq!(tk.encode("a 音", 16, TooLong::Error).unwrap().0, [3, 9, 2, 1]);
        let cut = tk.encode("a slow waltz", 3, TooLong::Truncate).unwrap();
        assert_eq!(cut, (vec![3, 4, 1], true));
    }

    #[test]
    fn an_empty_caption_and_a_missing_file_are_named() {
        let tk = Tokenizer::train(&captions(), 300).unwrap();
        let message =
            tk.encode_batch(&["a jig", " \n"], 8, TooLong::Truncate, &Device::Cpu).unwrap_err().to_string();
        assert!(message.starts_with("caption 1 is empty"), "{message}");
        let message = Tokenizer::load("no/such/tokenizer.json").err().unwrap().to_string();
        assert!(message.contains("no/such/tokenizer.json"), "{message}");
        assert!(matches!(Tokenizer::train(&[""], 300), Err(Error::Train { .. })));
        assert!(matches!(Tokenizer::train(&captions(), 10), Err(Error::Train { .. })));
    }
}
