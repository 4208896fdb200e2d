//! Pauses as an SVG: one group of bars for each load, on a logarithmic axis,
//! since contestants differ by powers of ten.

use std::fmt::Write;

use super::Spread;

/// A load with the pauses of those who moved it, in milliseconds.
pub struct Group {
    pub name: String,
    pub bars: Vec<Bar>,
}

pub struct Bar {
    pub name: &'static str,
    pub pause: Spread,
}

const WIDTH: f64 = 760.0;
/// Room for the names of loads on the left, and for figures on the right.
const LEFT: f64 = 120.0;
const RIGHT: f64 = 150.0;
const TOP: f64 = 64.0;
const BAR: f64 = 16.0;
const BETWEEN: f64 = 14.0;
const COLOURS: [&str; 3] = ["#0b6e99", "#e0a030", "#b0b0b0"];

pub fn svg(groups: &[Group]) -> String {
    let all = || groups.iter().flat_map(|group| &group.bars);
    let decade = |value: f64| value.max(1.0).log10();
    let lowest = all().map(|bar| decade(bar.pause.least).floor()).fold(f64::MAX, f64::min).min(6.0);
    let highest = all().map(|bar| decade(bar.pause.most).ceil()).fold(lowest + 1.0, f64::max);
    let x = |ms: f64| LEFT + (decade(ms) - lowest) / (highest - lowest) * (WIDTH - LEFT - RIGHT);
    let rows: f64 = groups.iter().map(|group| group.bars.len() as f64 * BAR + BETWEEN).sum();
    let bottom = TOP + rows;

    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"{LEFT}\" y=\"22\" font-size=\"15\">Pause of a container that moves, \
         as it sees it (median; line: all runs)</text>\n",
        height = bottom + 30.0
    );
    let mut at = LEFT;
    for (name, colour) in legend(groups) {
        let _ = writeln!(
            out,
            "<rect x=\"{at}\" y=\"34\" width=\"12\" height=\"12\" fill=\"{colour}\"/>\
             <text x=\"{}\" y=\"44\">{}</text>",
            at + 17.0,
            escaped(name)
        );
        at += 40.0 + name.len() as f64 * 7.0;
    }
    for power in lowest as i32..=highest as i32 {
        let at = x(10f64.powi(power));
        let _ = writeln!(
            out,
            "<line x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{TOP}\" y2=\"{bottom}\" stroke=\"#ddd\"/>\
             <text x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\" fill=\"#555\">{}</text>",
            bottom + 16.0,
            time(10f64.powi(power))
        );
    }
    let mut y = TOP;
    for group in groups {
        let middle = y + group.bars.len() as f64 * BAR / 2.0 + 4.0;
        let name = escaped(&group.name);
        let _ = writeln!(
            out,
            "<text x=\"{}\" y=\"{middle:.1}\" text-anchor=\"end\">{name}</text>",
            LEFT - 10.0
        );
        for bar in &group.bars {
            let colour =
                legend(groups).find(|(name, _)| *name == bar.name).map_or("black", |l| l.1);
            let (end, least, most) = (x(bar.pause.median), x(bar.pause.least), x(bar.pause.most));
            let line = y + (BAR - 2.0) / 2.0;
            let _ = writeln!(
                out,
                "<rect x=\"{LEFT}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{}\" fill=\"{colour}\"/>\
                 <line x1=\"{least:.1}\" x2=\"{most:.1}\" y1=\"{line:.1}\" y2=\"{line:.1}\" \
                 stroke=\"black\"/><text x=\"{:.1}\" y=\"{:.1}\">{}</text>",
                end - LEFT,
                BAR - 2.0,
                most.max(end) + 6.0,
                y + 12.0,
                time(bar.pause.median)
            );
            y += BAR;
        }
        y += BETWEEN;
    }
    out.push_str("</svg>\n");
    out
}

/// Contestants in the order in which they first appear, with their colours.
fn legend(groups: &[Group]) -> impl Iterator<Item = (&'static str, &'static str)> {
    let mut names: Vec<&'static str> = Vec::new();
    for bar in groups.iter().flat_map(|group| &group.bars) {
        if !names.contains(&bar.name) {
            names.push(bar.name);
        }
    }
    names.into_iter().zip(COLOURS.into_iter().cycle())
}

fn time(ms: f64) -> String {
    if ms >= 1000.0 { format!("{:.3} s", ms / 1000.0) } else { format!("{ms:.1} ms") }
        .replace(".000 s", " s")
        .replace(".0 ms", " ms")
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_longer_pause_has_a_longer_bar() {
        let bar = |name, ms| Bar { name, pause: Spread { median: ms, least: ms, most: ms } };
        let bars = vec![bar("ours", 20.0), bar("B1", 2000.0)];
        let svg = svg(&[Group { name: "1 GiB <idle>".into(), bars }]);
        assert!(
            svg.contains("1 GiB &lt;idle>") && svg.contains(">20 ms<") && svg.contains(">2 s<")
        );
        let width = |colour: &str| {
            let line =
                svg.lines().find(|line| line.contains(&format!("height=\"14\" fill=\"{colour}")));
            let text = line.and_then(|line| line.split("width=\"").nth(1)?.split('"').next());
            text.and_then(|text| text.parse::<f64>().ok()).unwrap_or_default()
        };
        assert!(width(COLOURS[0]) > 0.0 && width(COLOURS[1]) > 2.0 * width(COLOURS[0]), "{svg}");
    }

    #[test]
    fn nothing_measured_is_an_empty_chart() {
        assert!(svg(&[]).ends_with("</svg>\n"));
    }
}
