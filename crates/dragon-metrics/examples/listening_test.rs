//! Statistics of a listening test: 253 of 420 comparisons won (the numbers of the DRAGON paper), and the same with raters.
//!
//! `cargo run --release -p dragon-metrics --example listening_test`

use dragon_metrics::{Result, beta_posterior_above, binomial_p_value, clopper_pearson_lower, win_log_odds};

fn main() -> Result<()> {
    let (wins, n) = (253, 420);
    println!("win rate                       {:.2} %", 100.0 * wins as f64 / n as f64);
    println!("one-sided 95 % lower bound     {:.2} %", 100.0 * clopper_pearson_lower(wins, n, 0.95)?);
    println!("p-value (one-sided binomial)   {:.2e}", binomial_p_value(wins, n, 0.5)?);
    println!("P(win rate > 1/2)              {:.4} %", 100.0 * beta_posterior_above(wins, n, 0.5)?);

    // 21 raters with 20 comparisons each; raters differ in taste, so that their answers are not independent.
    let by_rater = [12, 15, 9, 13, 11, 14, 10, 12, 16, 8, 13, 12, 11, 14, 12, 10, 13, 12, 15, 9, 12];
    let raters: Vec<usize> = (0..by_rater.len()).collect();
    let fit = win_log_odds(&by_rater, &[20; 21], &raters)?;
    let odds = fit.coefficients[0];
    let share = |log_odds: f64| 100.0 / (1.0 + (-log_odds).exp());
    let (low, high) = odds.interval_95;
    println!(
        "clustered by rater             {:.2} % [{:.2}, {:.2}], z {:.2}, p {:.2e}",
        share(odds.estimate),
        share(low),
        share(high),
        odds.z,
        odds.p_value
    );
    Ok(())
}
