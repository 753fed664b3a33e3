//! Charts as inline SVG: curves, histograms and points with axes, ticks and a legend.

use std::fmt::Write as _;

use super::{Chart, Point, escape};

const WIDTH: f64 = 520.0;
const HEIGHT: f64 = 260.0;
const LEFT: f64 = 58.0;
const RIGHT: f64 = 12.0;
const TOP: f64 = 10.0;
const BOTTOM: f64 = 40.0;
const COLOURS: usize = 6; // --s0 … --s5 in the style sheet
const BINS: usize = 32;
/// Most distributions that are drawn as bars over each other; more are outlined.
const FILLED: usize = 2;

/// Appends a figure with the chart.
pub fn chart(page: &mut String, chart: &Chart) {
    match chart {
        Chart::Lines { title, x_label, y_label, series, log_y } => {
            let curves: Vec<(&str, Vec<(f64, f64)>)> = series
                .iter()
                .map(|s| {
                    let keep = |p: &&(f64, f64)| p.0.is_finite() && p.1.is_finite() && (!log_y || p.1 > 0.0);
                    let map = |p: &(f64, f64)| (p.0, if *log_y { p.1.log10() } else { p.1 });
                    (s.name.as_str(), s.points.iter().filter(keep).map(map).collect())
                })
                .collect();
            let all = curves.iter().flat_map(|c| c.1.iter());
            let frame = Frame::around(all.clone().map(|p| p.0), all.map(|p| p.1), *log_y);
            figure(page, title, x_label, y_label, frame, &names(&curves), |page, frame| {
                for (i, (_, points)) in curves.iter().enumerate() {
                    let _ = write!(
                        page,
                        "<polyline fill=\"none\" stroke=\"var(--s{})\" stroke-width=\"1.8\" \
                         stroke-linejoin=\"round\" points=\"",
                        i % COLOURS
                    );
                    for &(x, y) in points {
                        let _ = write!(page, "{:.1},{:.1} ", frame.x(x), frame.y(y));
                    }
                    page.push_str("\"/>");
                    if let [(x, y)] = points[..] {
                        let (x, y, colour) = (frame.x(x), frame.y(y), i % COLOURS);
                        let _ = write!(
                            page,
                            "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\" fill=\"var(--s{colour})\"/>"
                        );
                    }
                }
            });
        }
        Chart::Histogram { title, x_label, series } => {
            let values: Vec<(&str, Vec<f64>)> = series
                .iter()
                .map(|(name, v)| (name.as_str(), v.iter().copied().filter(|x| x.is_finite()).collect()))
                .collect();
            let all = values.iter().flat_map(|v| v.1.iter().copied());
            let (low, high) = range(all).unwrap_or((0.0, 1.0));
            let width = (high - low) / BINS as f64;
            let shares: Vec<(&str, Vec<f64>)> = values
                .iter()
                .map(|(name, v)| {
                    let mut bins = vec![0.0; BINS];
                    for x in v {
                        bins[(((x - low) / width) as usize).min(BINS - 1)] += 100.0 / v.len() as f64;
                    }
                    (*name, bins)
                })
                .collect();
            let highest = shares.iter().flat_map(|s| s.1.iter().copied()).fold(0.0, f64::max);
            let frame =
                (highest > 0.0).then_some(Frame { x: (low, high), y: (0.0, highest * 1.05), log_y: false });
            figure(page, title, x_label, "share, %", frame, &names(&shares), |page, frame| {
                for (i, (_, bins)) in shares.iter().enumerate() {
                    if shares.len() > FILLED {
                        outline(page, frame, bins, (low, width), i);
                        continue;
                    }
                    for (k, share) in bins.iter().enumerate().filter(|b| *b.1 > 0.0) {
                        let (x0, x1) =
                            (frame.x(low + k as f64 * width), frame.x(low + (k + 1) as f64 * width));
                        let (y0, y1) = (frame.y(*share), frame.y(0.0));
                        let _ = write!(
                            page,
                            "<rect x=\"{x0:.1}\" y=\"{y0:.1}\" width=\"{:.1}\" height=\"{:.1}\" \
                             fill=\"var(--s{})\" fill-opacity=\".5\"/>",
                            (x1 - x0 - 0.5).max(0.5),
                            y1 - y0,
                            i % COLOURS
                        );
                    }
                }
            });
        }
        Chart::Points { title, x_label, y_label, series } => {
            let sets: Vec<(&str, Vec<&Point>)> = series
                .iter()
                .map(|(name, points)| {
                    (name.as_str(), points.iter().filter(|p| p.x.is_finite() && p.y.is_finite()).collect())
                })
                .collect();
            let all = || sets.iter().flat_map(|set| set.1.iter());
            let frame = Frame::around(all().map(|p| p.x), all().map(|p| p.y), false).map(|frame| {
                let margin = 0.04 * (frame.x.1 - frame.x.0);
                Frame { x: (frame.x.0 - margin, frame.x.1 + margin), ..frame }
            });
            figure(page, title, x_label, y_label, frame, &names(&sets), |page, frame| {
                for (i, (_, points)) in sets.iter().enumerate().rev() {
                    // Few points are drawn large, many small.
                    let radius = if points.len() > 200 { 2.0 } else { 3.5 };
                    for point in points {
                        let _ = write!(
                            page,
                            "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"{radius}\" fill=\"var(--s{})\" \
                             fill-opacity=\".65\"><title>{}</title></circle>",
                            frame.x(point.x),
                            frame.y(point.y),
                            i % COLOURS,
                            escape(&point.label)
                        );
                    }
                }
            });
        }
    }
}

/// Bins from `low` on, each `width` wide, as one line of steps with a tint below it.
fn outline(page: &mut String, frame: &Frame, bins: &[f64], (low, width): (f64, f64), i: usize) {
    let colour = i % COLOURS;
    let _ = write!(
        page,
        "<polyline fill=\"var(--s{colour})\" fill-opacity=\".1\" stroke=\"var(--s{colour})\" stroke-width=\"1.6\" \
         stroke-linejoin=\"round\" points=\"{:.1},{:.1} ",
        frame.x(low),
        frame.y(0.0)
    );
    for (k, share) in bins.iter().enumerate() {
        let (x0, x1) = (frame.x(low + k as f64 * width), frame.x(low + (k + 1) as f64 * width));
        let _ = write!(page, "{x0:.1},{y:.1} {x1:.1},{y:.1} ", y = frame.y(*share));
    }
    let _ = write!(page, "{:.1},{:.1}\"/>", frame.x(low + bins.len() as f64 * width), frame.y(0.0));
}

fn names<'a, T>(series: &[(&'a str, T)]) -> Vec<&'a str> {
    series.iter().map(|s| s.0).collect()
}

/// The part of the plane that a chart shows; a logarithmic axis holds log10 of its values.
struct Frame {
    x: (f64, f64),
    y: (f64, f64),
    log_y: bool,
}

impl Frame {
    /// `None` without any value.
    fn around(xs: impl Iterator<Item = f64>, ys: impl Iterator<Item = f64>, log_y: bool) -> Option<Self> {
        let (x, (low, high)) = (range(xs)?, range(ys)?);
        let margin = 0.05 * (high - low);
        Some(Self { x, y: (low - margin, high + margin), log_y })
    }

    fn x(&self, x: f64) -> f64 {
        LEFT + (x - self.x.0) / (self.x.1 - self.x.0) * (WIDTH - LEFT - RIGHT)
    }

    fn y(&self, y: f64) -> f64 {
        HEIGHT - BOTTOM - (y - self.y.0) / (self.y.1 - self.y.0) * (HEIGHT - TOP - BOTTOM)
    }
}

/// Least and greatest value, drawn apart if they are equal; `None` without values.
fn range(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
    if low > high {
        None
    } else if low == high {
        let apart = 0.5 * low.abs().max(1e-3);
        Some((low - apart, high + apart))
    } else {
        Some((low, high))
    }
}

fn figure(
    page: &mut String,
    title: &str,
    x_label: &str,
    y_label: &str,
    frame: Option<Frame>,
    names: &[&str],
    draw: impl Fn(&mut String, &Frame),
) {
    let _ = write!(page, "<figure><figcaption>{}</figcaption>", escape(title));
    let Some(frame) = frame else {
        page.push_str("<p class=\"note\">no values</p></figure>");
        return;
    };
    let _ = write!(page, "<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\">");
    for tick in ticks(frame.x.0, frame.x.1) {
        let x = frame.x(tick);
        let _ = write!(
            page,
            "<text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
            HEIGHT - BOTTOM + 16.0,
            number(tick)
        );
    }
    for tick in ticks(frame.y.0, frame.y.1) {
        let y = frame.y(tick);
        let label = number(if frame.log_y { 10f64.powf(tick) } else { tick });
        let _ = write!(
            page,
            "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{label}</text>",
            WIDTH - RIGHT,
            LEFT - 6.0,
            y + 4.0
        );
    }
    let base = HEIGHT - BOTTOM;
    let _ = write!(
        page,
        "<line class=\"axis\" x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{base}\" y2=\"{base}\"/>",
        WIDTH - RIGHT
    );
    let _ = write!(
        page,
        "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>\
         <text transform=\"translate(12 {:.1}) rotate(-90)\" text-anchor=\"middle\">{}</text>",
        (LEFT + WIDTH - RIGHT) / 2.0,
        HEIGHT - 6.0,
        escape(x_label),
        (TOP + base) / 2.0,
        escape(y_label)
    );
    draw(page, &frame);
    page.push_str("</svg>");
    if names.len() > 1 {
        page.push_str("<div class=\"legend\">");
        for (i, name) in names.iter().enumerate() {
            let _ = write!(
                page,
                "<span><i style=\"background:var(--s{})\"></i>{}</span>",
                i % COLOURS,
                escape(name)
            );
        }
        page.push_str("</div>");
    }
    page.push_str("</figure>");
}

/// About five round numbers in [low, high].
fn ticks(low: f64, high: f64) -> Vec<f64> {
    let raw = (high - low) / 5.0;
    let power = 10f64.powf(raw.log10().floor());
    let step =
        [1.0, 2.0, 2.5, 5.0, 10.0].into_iter().map(|m| m * power).find(|s| *s >= raw).unwrap_or(10.0 * power);
    let first = (low / step).ceil() as i64;
    let last = (high / step).floor() as i64;
    (first..=last).map(|i| i as f64 * step).collect()
}

/// A tick's label, with at most four significant digits.
fn number(value: f64) -> String {
    let magnitude = value.abs();
    if magnitude < 1e-12 {
        "0".into()
    } else if !(1e-3..1e5).contains(&magnitude) {
        format!("{value:.1e}")
    } else {
        let digits = (3 - magnitude.log10().floor() as i32).clamp(0, 6) as usize;
        let text = format!("{value:.digits$}");
        if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_inside() {
        assert_eq!(ticks(0.0, 10.0), [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]);
        assert_eq!(ticks(-0.3, 0.3), [-0.2, 0.0, 0.2]);
        assert_eq!(number(0.25), "0.25");
        assert_eq!(number(1500.0), "1500");
        assert_eq!(number(-2.0), "-2");
    }

    #[test]
    fn two_distributions_are_bars_and_more_are_outlines() {
        let draw = |n: usize| {
            let series = (0..n).map(|i| (format!("s{i}"), vec![0.0, i as f64, 3.0])).collect();
            let histogram = Chart::Histogram { title: String::new(), x_label: String::new(), series };
            let mut page = String::new();
            chart(&mut page, &histogram);
            (page.matches("<rect").count(), page.matches("<polyline").count())
        };
        assert_eq!(draw(2), (2 + 3, 0)); // values 0, 0, 3 and 0, 1, 3
        assert_eq!(draw(3), (0, 3));
    }

    #[test]
    fn a_range_of_equal_values_has_a_width() {
        let (low, high) = range([3.0, 3.0].into_iter()).unwrap();
        assert!(low < 3.0 && 3.0 < high);
        assert!(range(std::iter::empty()).is_none());
    }
}
