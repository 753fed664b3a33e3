//! Algorithm 1, its invariants, and rewards built from config.

use std::sync::Arc;

use dragon_metrics::bootstrap::SplitMix64;
use dragon_metrics::{Clip, FrechetReference, GaussianStats, Rows, files};
use dragon_rewards::*;
use proptest::prelude::*;

/// Rows whose coordinates shrink: by 0.9 each in low dimensions, so that the last of 512 is still 0.6 % of the first.
fn rows(seed: u64, n: usize, dim: usize) -> Rows {
    let decay: f64 = if dim > 100 { 0.99 } else { 0.9 };
    let mut rng = SplitMix64(seed);
    let mut uniform = || (rng.next() >> 11) as f64 / (1u64 << 53) as f64;
    let data = (0..n * dim)
        .map(|i| ((0..12).map(|_| uniform()).sum::<f64>() - 6.0) * decay.powi((i % dim) as i32) + 0.2)
        .collect();
    Rows::new(n, dim, data).unwrap()
}

fn songs(seed: u64, n: usize, windows: usize, dim: usize) -> Vec<Song> {
    (0..n as u64)
        .map(|i| Song::with_text(rows(seed + i, windows, dim), rows(seed + 500 + i, 1, dim).data().to_vec()))
        .collect()
}

fn refs(songs: &[Song]) -> Vec<&Song> {
    songs.iter().collect()
}

fn reference(dim: usize) -> Arc<FrechetReference> {
    Arc::new(FrechetReference::from_rows(&rows(77, 5 * dim, dim)).unwrap())
}

/// Algorithm 1 with every set scored from its rows: the definition.
fn naive(reward: &dyn DistributionReward, sets: &[&[&Song]]) -> Demonstrations {
    let pool = sets.concat();
    algorithm_1(sets[0].len(), sets.len(), 0..sets[0].len(), |members| {
        reward.score(&members.iter().map(|&m| pool[m]).collect::<Vec<_>>())
    })
    .unwrap()
}

fn check(reward: &dyn DistributionReward, sets: &[&[&Song]]) {
    let n = sets[0].len();
    let fast = greedy(reward, sets, 0..n).unwrap();
    let slow = naive(reward, sets);
    assert_eq!((&fast.plus, &fast.minus), (&slow.plus, &slow.minus));
    for (a, b) in [
        (fast.reward_plus, slow.reward_plus),
        (fast.reward_minus, slow.reward_minus),
        (fast.reward_first, slow.reward_first),
        (fast.reward_second, slow.reward_second),
    ] {
        assert!((a - b).abs() < 1e-8, "{a} against {b}");
    }
    assert!(fast.reward_plus >= fast.reward_first.max(fast.reward_second));
    for (i, (plus, minus)) in fast.plus.iter().zip(&fast.minus).enumerate() {
        assert_eq!([plus % n, minus % n], [i, i], "pairs stay together");
        assert_ne!(plus, minus, "of two songs of a prompt");
    }
    let score = |members: &[usize]| {
        reward.score(&members.iter().map(|&m| sets[m / n][m % n]).collect::<Vec<_>>()).unwrap()
    };
    for k in 0..sets.len() {
        let set = score(&(k * n..(k + 1) * n).collect::<Vec<_>>());
        assert!(fast.reward_plus >= set - 1e-8, "D{} is better than D+", k + 1);
    }
    assert!(fast.reward_minus <= fast.reward_plus);
}

#[test]
fn incremental_passes_equal_the_naive_pass_for_every_reward_of_sets() {
    // Fewer rows than dimensions (Gram matrix), more (second moments per song), and the mixed sizes of real songs.
    for (pairs, windows, dim) in [(6, 3, 40), (8, 9, 24), (5, 1, 12), (4, 60, 8)] {
        let (a, b) = (songs(1, pairs, windows, dim), songs(900, pairs, windows + pairs % 2, dim));
        let c = songs(1800, pairs, windows, dim);
        let (a, b, c) = (refs(&a), refs(&b), refs(&c));
        let fad = DatasetFad { slot: 0, reference: reference(dim) };
        check(&fad, &[&a, &b]);
        check(&fad, &[&a, &b, &c]);
        check(&Vendi { slot: 0, pooling: Pooling::SongMean }, &[&a, &b]);
        check(&Vendi { slot: 0, pooling: Pooling::SongMean }, &[&a, &b, &c]);
        check(&Vendi { slot: 0, pooling: Pooling::Windows }, &[&a, &b]);
        check(&Vendi { slot: 0, pooling: Pooling::Windows }, &[&a, &b, &c]);
        check(&MeanOf(Box::new(ClapScore { slot: 0, clip: Clip::BeforeMean })), &[&a, &b]);
        check(&MeanOf(Box::new(ClapScore { slot: 0, clip: Clip::BeforeMean })), &[&a, &b, &c]);
        let mut sum = WeightedDistributions::new(vec![
            (1.0, Box::new(fad) as Box<dyn DistributionReward>),
            (0.5, Box::new(Vendi { slot: 0, pooling: Pooling::SongMean })),
        ]);
        sum.observe(&[&a, &b]).unwrap();
        check(&sum, &[&a, &b]);
        check(&sum, &[&a, &b, &c]);
    }
}

#[test]
fn the_form_for_many_rows_of_high_dimension_corrects_a_base() {
    // 24 x 24 = 576 rows > 512, and 48 tables of 512 x 512 moments are too many to keep: a base is corrected by each swap.
    let dim = 512;
    let stats = GaussianStats::fit(&rows(7, 700, dim)).unwrap();
    let fad = DatasetFad { slot: 0, reference: Arc::new(FrechetReference::new(&stats).unwrap()) };
    let (a, b) = (songs(1, 24, 24, dim), songs(900, 24, 24, dim));
    check(&fad, &[&refs(&a), &refs(&b)]);
}

#[test]
fn the_reward_of_d_plus_never_falls_during_a_pass() {
    let (a, b) = (songs(1, 10, 4, 16), songs(900, 10, 4, 16));
    let (a, b) = (refs(&a), refs(&b));
    let fad = DatasetFad { slot: 0, reference: reference(16) };
    let mut last = f64::NEG_INFINITY;
    for done in 0..=10 {
        let part = greedy(&fad, &[&a, &b], 0..done).unwrap();
        assert!(part.reward_plus >= last, "after {done} pairs");
        last = part.reward_plus;
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_mean_of_an_instance_reward_gives_the_best_and_the_worst_of_each_prompt(
        scores in (2usize..5).prop_flat_map(|n_sets| prop::collection::vec(prop::collection::vec(0u32..50, n_sets), 1..30))
    ) {
        let (n, n_sets) = (scores.len(), scores[0].len());
        // A window (cos, sin) against the text (1, 0) has exactly the cosine we choose.
        let song = |s: u32| {
            let angle = f64::from(s) / 40.0;
            Song::with_text(Rows::from_vecs(&[[angle.cos(), angle.sin()]]).unwrap(), vec![1.0, 0.0])
        };
        let sets: Vec<Vec<Song>> = (0..n_sets).map(|k| scores.iter().map(|of| song(of[k])).collect()).collect();
        let sets: Vec<Vec<&Song>> = sets.iter().map(|set| refs(set)).collect();
        let sets: Vec<&[&Song]> = sets.iter().map(Vec::as_slice).collect();
        let clap = ClapScore { slot: 0, clip: Clip::BeforeMean };
        let winners = paired(&Reward::Instance(Box::new(clap)), &sets).unwrap();
        let pass = greedy(&MeanOf(Box::new(clap)), &sets, 0..n).unwrap();
        for (i, of) in scores.iter().enumerate() {
            // The smallest angle has the largest cosine.
            let found = [&winners, &pass].map(|d| [of[d.plus[i] / n], of[d.minus[i] / n]]);
            let (best, worst) = (of.iter().min().unwrap(), of.iter().max().unwrap());
            prop_assert_eq!(found, [[*best, *worst]; 2], "prompt {}", i);
            prop_assert!(winners.plus[i] % n == i && winners.minus[i] % n == i && winners.plus[i] != winners.minus[i]);
        }
        prop_assert!((winners.reward_plus - pass.reward_plus).abs() < 1e-12);
        prop_assert!((winners.reward_minus - pass.reward_minus).abs() < 1e-12);
    }

    #[test]
    fn a_pass_over_any_scores_keeps_its_invariants(values in prop::collection::vec(-1.0f64..1.0, 64), n_sets in 2usize..5) {
        // An arbitrary function of the subset.
        let score = |members: &[usize]| -> Result<f64> {
            Ok(values[members.iter().fold(0usize, |h, m| (h * 31 + m * 17 + 7) % 64)])
        };
        let found = algorithm_1(6, n_sets, 0..6, score).unwrap();
        prop_assert!(found.reward_plus >= found.reward_first.max(found.reward_second));
        prop_assert_eq!(found.reward_plus, score(&found.plus).unwrap());
        prop_assert_eq!(found.reward_minus, score(&found.minus).unwrap());
    }
}

#[test]
fn unpaired_songs_split_at_the_mean_or_the_median() {
    let song =
        |angle: f64| Song::with_text(Rows::from_vecs(&[[angle.cos(), angle.sin()]]).unwrap(), vec![1.0, 0.0]);
    let all: Vec<Song> = [0.0, 0.1, 0.2, 1.5].map(song).into();
    let reward = Reward::Instance(Box::new(ClapScore { slot: 0, clip: Clip::BeforeMean }));
    let mean = unpaired(&reward, &refs(&all), Split::Mean).unwrap();
    assert_eq!((mean.plus.as_slice(), mean.minus.as_slice()), (&[0, 1, 2][..], &[3][..]));
    let median = unpaired(&reward, &refs(&all), Split::Median).unwrap();
    assert_eq!((median.plus.as_slice(), median.minus.as_slice()), (&[0, 1][..], &[2, 3][..]));
    assert!(median.reward_plus > median.reward_minus);
    let same = vec![song(0.3); 3];
    let same = unpaired(&reward, &refs(&same), Split::Mean).unwrap();
    assert!(same.plus.is_empty() && same.minus.is_empty(), "equal rewards teach nothing");
    let diverse = Reward::Distribution(Box::new(Vendi { slot: 0, pooling: Pooling::SongMean }));
    let message = unpaired(&diverse, &refs(&all), Split::Mean).unwrap_err().to_string();
    assert!(message.contains("expected `paired`"), "{message}");
}

#[test]
fn a_distance_is_negated_once() {
    let (dim, reference) = (8, reference(8));
    let near = Song::new(rows(5, 20, dim));
    let far = Song::new(Rows::from_f32(2, dim, &[9.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0].repeat(2)).unwrap());
    let per_song = PerSongFad { slot: 0, reference: Arc::clone(&reference) };
    assert!(per_song.score(&near).unwrap() > per_song.score(&far).unwrap());
    assert_eq!(per_song.score(&near).unwrap(), -reference.distance(&near.views[0].embeddings).unwrap());
    let set = DatasetFad { slot: 0, reference };
    assert_eq!(set.score(&[&near]).unwrap(), per_song.score(&near).unwrap());
}

const PER_SONG: &str = r#"
kind = "per_song_fad"
encoder = "musicnn"
setting = "ma"
exemplars = { kind = "audio", path = "music" }
"#;

#[test]
fn a_config_builds_its_reward_and_asks_once_for_each_reference() {
    let config: RewardConfig = toml::from_str(
        r#"
        kind = "random_mix"
        [[rewards]]
        kind = "per_song_fad"
        encoder = "musicnn"
        setting = "ma"
        exemplars = { kind = "audio", path = "music" }
        [[rewards]]
        kind = "clap_score"
        encoder = "clap"
        setting = "ma"
        clip = "before_mean"
        [[rewards]]
        kind = "weighted_sum"
        terms = [
            { weight = 1.0, reward = { kind = "dataset_fad", encoder = "musicnn", setting = "ma", exemplars = { kind = "audio", path = "music" } } },
            { weight = 0.5, reward = { kind = "vendi", encoder = "clap", setting = "ma", pooling = "song_mean" } },
        ]
        "#,
    )
    .unwrap();
    assert_eq!(
        config.label(),
        "mix(per_song_fad(musicnn/ma to music) | clap_score(clap/ma) | sum(1*dataset_fad(musicnn/ma to music) + 0.5*vendi(clap/ma)))"
    );
    let source = |encoder: &str| Source { encoder: encoder.into(), setting: "ma".into() };
    assert_eq!(config.sources(), [source("musicnn"), source("clap")]);
    assert!(config.needs_text(&source("clap")) && !config.needs_text(&source("musicnn")));
    let mut asked = Vec::new();
    let mut set = RewardSet::build(&config, |source, exemplars| {
        asked.push((source.clone(), exemplars.clone()));
        FrechetReference::from_rows(&rows(1, 40, 6)).map(Arc::new)
    })
    .unwrap();
    assert_eq!(asked.len(), 1);
    assert_eq!(set.len(), 3);
    assert_eq!([0, 1, 2].map(|k| set.pick(k * (u64::MAX / 3) + 10)), [0, 1, 2]);
    let song = |seed: u64| {
        let (audio, clap) = (songs(seed, 1, 5, 6), songs(seed + 50, 1, 3, 4));
        Song { views: vec![audio[0].views[0].clone(), clap[0].views[0].clone()] }
    };
    let (a, b): (Vec<Song>, Vec<Song>) = (0..4).map(|i| (song(i), song(100 + i))).unzip();
    let (a, b) = (refs(&a), refs(&b));
    for i in 0..3 {
        set.get_mut(i).unwrap().observe(&[&a, &b]).unwrap();
        let demonstrations = paired(set.get(i).unwrap(), &[&a, &b]).unwrap();
        let start = demonstrations.reward_first.max(demonstrations.reward_second);
        assert!(demonstrations.reward_plus >= start, "{}", set.label(i).unwrap());
    }
    assert_eq!(set.state()[2].len(), 2);
    let saved = serde_json::to_string(&set.state()).unwrap();
    let mut again =
        RewardSet::build(&config, |_, _| FrechetReference::from_rows(&rows(1, 40, 6)).map(Arc::new)).unwrap();
    again.load_state(&serde_json::from_str::<Vec<Vec<RunningStats>>>(&saved).unwrap()).unwrap();
    let both = [&set, &again].map(|s| s.get(2).unwrap().set_score(&a).unwrap());
    assert_eq!(both[0], both[1], "a restored state scores the same bits");
    assert!(again.load_state(&[]).is_err());
    let text = toml::to_string(&config).unwrap();
    assert_eq!(toml::from_str::<RewardConfig>(&text).unwrap(), config);
}

#[test]
fn normalised_sums_do_not_depend_on_the_units_of_a_term() {
    let (a, b) = (songs(1, 6, 4, 8), songs(900, 6, 4, 8));
    let all = [refs(&a), refs(&b)].concat();
    let fad = || PerSongFad { slot: 0, reference: reference(8) };
    let mut sum = WeightedInstances::new(vec![
        (1.0, Box::new(fad()) as Box<dyn InstanceReward>),
        (1.0, Box::new(ClapScore { slot: 0, clip: Clip::AfterMean })),
    ]);
    sum.observe(&all).unwrap();
    let total: f64 = all.iter().map(|s| sum.score(s).unwrap()).sum();
    assert!(total.abs() < 1e-9, "normalised rewards average to zero: {total}");
    let state = sum.state();
    assert!((state[0].normalize(state[0].mean + state[0].std()) - 1.0).abs() < 1e-12);
    assert_eq!(RunningStats::default().normalize(3.0), 3.0);
}

#[test]
fn a_statistics_file_is_read_when_the_reward_is_built() {
    let path = std::env::temp_dir().join(format!("dragon-rewards-{}.npz", std::process::id()));
    files::write_stats(&path, "clap", &GaussianStats::fit(&rows(1, 40, 6)).unwrap()).unwrap();
    let config = RewardConfig::DatasetFad {
        encoder: "clap".into(),
        setting: "ma".into(),
        exemplars: Exemplars::Statistics { path: path.clone(), name: None },
    };
    let never = |_: &Source, _: &Exemplars| Err::<Arc<FrechetReference>, _>("must not be asked");
    let built = RewardSet::build(&config, never);
    std::fs::remove_file(&path).unwrap();
    assert_eq!(built.unwrap().len(), 1);
    let message = RewardSet::build(&config, never).unwrap_err().to_string();
    assert!(message.contains("cannot read"), "{message}");
}

#[test]
fn mistakes_in_a_config_are_named() {
    let parse = |text: &str| toml::from_str::<RewardConfig>(text);
    let unknown = parse(&format!("{PER_SONG}colour = 3\n")).unwrap_err().to_string();
    assert!(unknown.contains("colour"), "{unknown}");
    let kind = parse("kind = \"fad\"").unwrap_err().to_string();
    assert!(kind.contains("per_song_fad"), "{kind}");
    let exemplars =
        parse(&PER_SONG.replace("path = \"music\"", "folder = \"music\"")).unwrap_err().to_string();
    assert!(exemplars.contains("folder") || exemplars.contains("path"), "{exemplars}");
    let invalid = |config: RewardConfig| config.validate().unwrap_err().to_string();
    let plain = parse(PER_SONG).unwrap();
    let mix = |rewards| RewardConfig::RandomMix { rewards };
    let sum = |weight, reward| RewardConfig::WeightedSum { terms: vec![Term { weight, reward }] };
    assert!(invalid(mix(vec![])).contains("`rewards` is an empty list"));
    assert!(invalid(mix(vec![mix(vec![plain.clone()])])).contains("write one list"));
    assert!(invalid(sum(0.0, plain.clone())).contains("`weight` is 0 in every term"));
    assert!(invalid(sum(f64::NAN, plain.clone())).contains("NaN"));
    assert!(invalid(sum(1.0, mix(vec![plain.clone()]))).contains("plain rewards"));
    assert!(invalid(RewardConfig::WeightedSum { terms: vec![] }).contains("`terms`"));
    assert!(invalid(parse(&PER_SONG.replace("musicnn", "")).unwrap()).contains("`encoder` is empty"));
    let failed =
        RewardSet::build(&plain, |_, _| Err::<Arc<FrechetReference>, _>("no audio in there")).unwrap_err();
    assert_eq!(failed.to_string(), "reference statistics of audio `music` for musicnn/ma: no audio in there");
}

#[test]
fn songs_that_cannot_be_scored_are_named() {
    let (a, b) = (songs(1, 3, 4, 8), songs(900, 3, 4, 8));
    let fad = |slot| Reward::Instance(Box::new(PerSongFad { slot, reference: reference(8) }));
    let message = |r: Result<Demonstrations>| r.unwrap_err().to_string();
    let (ra, rb) = (refs(&a), refs(&b));
    assert!(message(paired(&fad(1), &[&ra, &rb])).starts_with("song 0: the song has 1 embedding sets"));
    assert!(message(paired(&fad(0), &[&ra, &rb[..2]])).contains("have [3, 2] songs"));
    assert!(message(paired(&fad(0), &[&[], &[]])).contains("at least one"));
    assert!(message(paired(&fad(0), &[&ra])).contains("two sets or more"));
    let mut broken = a.clone();
    broken[1].views[0].embeddings = rows(1, 1, 8);
    assert!(message(paired(&fad(0), &[&refs(&broken), &rb])).starts_with("song 1: "));
    broken[1].views[0].embeddings = rows(1, 4, 7);
    assert!(message(paired(&fad(0), &[&refs(&broken), &rb])).contains("expected dimension 8, found 7"));
    let set = DatasetFad { slot: 0, reference: reference(8) };
    assert!(message(greedy(&set, &[&refs(&broken), &rb], 0..3)).contains("song 1"));
    assert!(message(greedy(&set, &[&ra, &rb], 0..4)).contains("swaps of pairs 0..4"));
    assert!(message(algorithm_1(2, 2, 0..2, |_| Ok(f64::NAN))).contains("reward is NaN"));
    let clap = Reward::Instance(Box::new(ClapScore { slot: 0, clip: Clip::BeforeMean }));
    let mute = [Song::new(rows(1, 2, 8))];
    assert!(clap.song_scores(&refs(&mute)).unwrap_err().to_string().contains("no text embedding"));
}

#[test]
fn ranks_that_gather_see_one_global_set() {
    let parts = [songs(1, 3, 4, 6), songs(40, 2, 3, 6), vec![]];
    let gathered: Vec<Vec<Song>> = std::thread::scope(|scope| {
        let threads: Vec<_> = dragon_dist::in_process(3)
            .into_iter()
            .zip(&parts)
            .map(|(group, part)| scope.spawn(move || gather_songs(&group, part).unwrap()))
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    for all in gathered {
        assert_eq!(all, parts.concat());
    }
}
