//! Pictures of a recording: where it writes over time, the working set against its window, the dirty rate.

use super::super::units::{Bytes, Time};
use super::heat::{Axis, Heat};
use anyhow::{Context, bail};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::register_font;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Size of the picture, in pixels.
const SIZE: (u32, u32) = (1400, 1100);
/// Of that, the height of the heat map.
const HEAT_HEIGHT: u32 = 620;
/// Cells of the heat map.
pub(super) const CELLS: (usize, usize) = (280, 180);
/// Steps of the heat map's colours: neighbours of one colour are drawn as one.
const SHADES: usize = 16;
const FIRST: RGBColor = RGBColor(0x1b, 0x6c, 0xa8);
const REPEATED: RGBColor = RGBColor(0xd9, 0x6c, 0x1e);
const LINE: RGBColor = RGBColor(0x33, 0x33, 0x33);
const PALE: RGBColor = RGBColor(0xdd, 0xdd, 0xdd);
/// Fonts of Debian's packages (fonts-dejavu-core, fonts-liberation, fonts-freefont-ttf) and of other distributions.
const FONTS: [&str; 6] = [
    "/usr/share/fonts/truetype/dejavu/DejaVuSans.ttf",
    "/usr/share/fonts/dejavu-sans-fonts/DejaVuSans.ttf",
    "/usr/share/fonts/TTF/DejaVuSans.ttf",
    "/usr/share/fonts/truetype/liberation/LiberationSans-Regular.ttf",
    "/usr/share/fonts/liberation-sans/LiberationSans-Regular.ttf",
    "/usr/share/fonts/truetype/freefont/FreeSans.ttf",
];

/// What a picture shows.
#[derive(Debug)]
pub(super) struct Picture {
    /// Line above all of it.
    pub(super) title: String,
    /// Length of the recording.
    pub(super) duration: Duration,
    pub(super) axis: Axis,
    pub(super) heat: Heat,
    /// Window, pages written in it, and the error of that.
    pub(super) curve: Vec<(Duration, f64, f64)>,
    /// Time, pages a second that were dirty for the first time, and again.
    pub(super) rates: Vec<(Duration, f64, f64)>,
}

/// What a picture is written as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    Svg,
    Png,
}

impl Format {
    /// By the name's ending.
    pub(super) fn of(path: &Path) -> anyhow::Result<Self> {
        match path.extension().and_then(|ending| ending.to_str()).map(str::to_lowercase).as_deref() {
            Some("svg") => Ok(Self::Svg),
            Some("png") => Ok(Self::Png),
            _ => bail!("{} is no picture that can be written: name it .svg or .png", path.display()),
        }
    }
}

/// Draws the picture into a file. What was there is replaced when the picture is complete, and not before.
pub(super) fn write(picture: &Picture, path: &Path) -> anyhow::Result<()> {
    let format = Format::of(path)?;
    use_font()?;
    let mut name = path.file_name().context("the picture needs a name")?.to_owned();
    name.push(format!(".{}.part", std::process::id()));
    let draft = path.with_file_name(name);
    let drawn = match format {
        Format::Svg => {
            let mut text = String::new();
            let drawn = draw(picture, &SVGBackend::with_string(&mut text, SIZE).into_drawing_area());
            drawn.and_then(|()| Ok(std::fs::write(&draft, text)?))
        }
        Format::Png => png(picture, &draft),
    };
    let written = drawn.and_then(|()| Ok(std::fs::rename(&draft, path)?));
    if written.is_err() {
        let _ = std::fs::remove_file(&draft);
    }
    written.with_context(|| format!("the picture {} could not be written", path.display()))
}

fn png(picture: &Picture, path: &Path) -> anyhow::Result<()> {
    let mut pixels = vec![0; (SIZE.0 * SIZE.1 * 3) as usize];
    {
        let area = BitMapBackend::with_buffer(&mut pixels, SIZE).into_drawing_area();
        draw(picture, &area)?;
    }
    let mut encoder =
        png::Encoder::new(std::io::BufWriter::new(std::fs::File::create(path)?), SIZE.0, SIZE.1);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    let mut writer = encoder.write_header()?;
    writer.write_image_data(&pixels)?;
    Ok(writer.finish()?)
}

/// Registers a font of this machine, once.
fn use_font() -> anyhow::Result<()> {
    static FONT: std::sync::OnceLock<Result<(), String>> = std::sync::OnceLock::new();
    let found = FONT.get_or_init(|| {
        let path = FONTS.iter().map(PathBuf::from).find(|path| path.is_file());
        let path = path.ok_or("no font was found: install fonts-dejavu-core")?;
        let bytes = std::fs::read(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        // For the rest of the program's life: the library keeps fonts for good.
        register_font("sans-serif", FontStyle::Normal, Vec::leak(bytes))
            .map_err(|_| format!("{} is no font that can be used", path.display()))
    });
    found.clone().map_err(|text| anyhow::anyhow!("a picture needs a font for its numbers; {text}"))
}

type Area<'a, B> = DrawingArea<B, Shift>;

fn draw<B: DrawingBackend>(picture: &Picture, area: &Area<'_, B>) -> anyhow::Result<()>
where
    B::ErrorType: 'static,
{
    // The library's errors borrow from the backend.
    let plain = |error: DrawingAreaErrorKind<B::ErrorType>| anyhow::anyhow!("drawing failed: {error}");
    area.fill(&WHITE).map_err(plain)?;
    let area = area.titled(&picture.title, ("sans-serif", 22)).map_err(plain)?;
    let (above, below) = area.split_vertically(HEAT_HEIGHT);
    let (left, right) = below.split_horizontally(SIZE.0 / 2);
    heat_map(picture, &above).map_err(plain)?;
    working_set(picture, &left).map_err(plain)?;
    dirty_rate(picture, &right).map_err(plain)?;
    area.present().map_err(plain)
}

type Drawn<B> = Result<(), DrawingAreaErrorKind<<B as DrawingBackend>::ErrorType>>;

/// Seconds of a picture: never an empty range.
fn seconds(duration: Duration) -> f64 {
    duration.as_secs_f64().max(1e-3)
}

fn bytes(pages: f64) -> String {
    Bytes((pages * 4096.0).round().max(0.0) as u64).to_string()
}

fn time(seconds: f64) -> String {
    if seconds == 0.0 {
        return "0".to_owned();
    }
    Time(Duration::from_secs_f64(seconds.max(0.0))).to_string()
}

fn heat_map<B: DrawingBackend>(picture: &Picture, area: &Area<'_, B>) -> Drawn<B> {
    let (columns, rows) = picture.heat.size();
    let mut chart = ChartBuilder::on(area)
        .caption("dirty pages by address (gaps left out)", ("sans-serif", 16))
        .margin(8)
        .margin_right(20)
        .x_label_area_size(40)
        .y_label_area_size(150)
        .build_cartesian_2d(0.0..seconds(picture.duration), 0.0..rows as f64)?;
    chart
        .configure_mesh()
        .disable_y_mesh()
        .disable_x_mesh()
        .disable_y_axis()
        .x_label_formatter(&|x| time(*x))
        .x_desc("time")
        .axis_desc_style(("sans-serif", 14))
        .draw()?;
    let width = seconds(picture.duration) / columns as f64;
    // Runs of one shade along time are one rectangle: most of a picture is one of a few.
    let mut grid = vec![0usize; columns * rows];
    for (column, row, share) in picture.heat.cells(&picture.axis) {
        grid[row * columns + column] = 1 + ((share * (SHADES - 1) as f64).round() as usize).min(SHADES - 1);
    }
    for row in 0..rows {
        let line = &grid[row * columns..(row + 1) * columns];
        let mut column = 0;
        while column < columns {
            let shade = line[column];
            let len = line[column..].iter().take_while(|other| **other == shade).count();
            if shade > 0 {
                let corners =
                    [(column as f64 * width, row as f64), ((column + len) as f64 * width, (row + 1) as f64)];
                chart.draw_series(std::iter::once(Rectangle::new(corners, colour(shade).filled())))?;
            }
            column += len;
        }
    }
    // Names of the stretches, as far as there is room, and a line between them.
    let scale = rows as f64 / picture.axis.pages().max(1) as f64;
    let mut free_from = 0.0;
    for (name, first, pages) in picture.axis.stretches() {
        let (low, high) = (first as f64 * scale, (first + pages) as f64 * scale);
        if high - low >= 0.5 {
            let ends = [(0.0, high), (seconds(picture.duration), high)];
            chart.draw_series(LineSeries::new(ends, &PALE))?;
        }
        let middle = (low + high) / 2.0;
        // A line of text is about five rows high.
        if middle - 2.5 >= free_from && high - low >= 0.5 {
            let text = format!("{}  {}", short(name, 16), bytes(pages as f64));
            let (x, y) = chart.backend_coord(&(0.0, middle));
            let corner = area.get_base_pixel();
            let style =
                ("sans-serif", 11).into_font().color(&LINE).pos(plotters::style::text_anchor::Pos::new(
                    plotters::style::text_anchor::HPos::Right,
                    plotters::style::text_anchor::VPos::Center,
                ));
            area.draw(&Text::new(text, (x - 6 - corner.0, y - corner.1), style))?;
            free_from = middle + 2.5;
        }
    }
    Ok(())
}

/// From pale to dark, by the share of pages.
fn colour(shade: usize) -> RGBColor {
    let share = (shade as f64 / SHADES as f64).sqrt();
    let mix = |pale: f64, dark: f64| (pale + (dark - pale) * share) as u8;
    RGBColor(mix(255.0, 140.0), mix(226.0, 10.0), mix(170.0, 20.0))
}

fn short(text: &str, len: usize) -> String {
    match text.char_indices().nth(len) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

fn working_set<B: DrawingBackend>(picture: &Picture, area: &Area<'_, B>) -> Drawn<B> {
    let points: Vec<(f64, f64, f64)> =
        picture.curve.iter().map(|(tau, pages, error)| (seconds(*tau), *pages, *error)).collect();
    let first = points.first().map_or(0.1, |point| point.0);
    let last = points.last().map_or(1.0, |point| point.0).max(first * 1.01);
    let top = points.iter().map(|point| point.1 + point.2).fold(1.0, f64::max) * 1.05;
    let mut chart = ChartBuilder::on(area)
        .caption("writable working set WWS(τ)", ("sans-serif", 16))
        .margin(8)
        .x_label_area_size(40)
        .y_label_area_size(80)
        .build_cartesian_2d((first..last).log_scale(), 0.0..top)?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(PALE)
        .x_label_formatter(&|x| time(*x))
        .y_label_formatter(&|y| bytes(*y))
        .x_desc("window τ")
        .axis_desc_style(("sans-serif", 14))
        .draw()?;
    let band: Vec<(f64, f64)> = points
        .iter()
        .map(|(tau, pages, error)| (*tau, pages + error))
        .chain(points.iter().rev().map(|(tau, pages, error)| (*tau, (pages - error).max(0.0))))
        .collect();
    chart.draw_series(std::iter::once(Polygon::new(band, FIRST.mix(0.2))))?;
    let line = points.iter().map(|(tau, pages, _)| (*tau, *pages));
    chart.draw_series(LineSeries::new(line, FIRST.stroke_width(2)))?;
    Ok(())
}

fn dirty_rate<B: DrawingBackend>(picture: &Picture, area: &Area<'_, B>) -> Drawn<B> {
    let points: Vec<(f64, f64, f64)> =
        picture.rates.iter().map(|(at, first, repeated)| (at.as_secs_f64(), *first, *repeated)).collect();
    let top = points.iter().map(|point| point.1 + point.2).fold(1.0, f64::max) * 1.1;
    let mut chart = ChartBuilder::on(area)
        .caption("dirty rate", ("sans-serif", 16))
        .margin(8)
        .margin_right(20)
        .x_label_area_size(40)
        .y_label_area_size(90)
        .build_cartesian_2d(0.0..seconds(picture.duration), 0.0..top)?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(PALE)
        .x_label_formatter(&|x| time(*x))
        .y_label_formatter(&|y| format!("{}/s", bytes(*y)))
        .x_desc("time")
        .axis_desc_style(("sans-serif", 14))
        .draw()?;
    let all = points.iter().map(|(at, first, repeated)| (*at, first + repeated));
    chart
        .draw_series(AreaSeries::new(all, 0.0, FIRST.mix(0.8)))?
        .label("pages written for the first time")
        .legend(|(x, y)| Rectangle::new([(x, y - 5), (x + 12, y + 5)], FIRST.mix(0.8).filled()));
    let repeated = points.iter().map(|(at, _, repeated)| (*at, *repeated));
    chart
        .draw_series(AreaSeries::new(repeated, 0.0, REPEATED))?
        .label("pages written again")
        .legend(|(x, y)| Rectangle::new([(x, y - 5), (x + 12, y + 5)], REPEATED.filled()));
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .background_style(WHITE.mix(0.8))
        .border_style(PALE)
        .label_font(("sans-serif", 12))
        .draw()?;
    Ok(())
}
