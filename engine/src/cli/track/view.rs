//! The live view: what a person leaves open in a terminal.

use super::super::units::{Rate, Time};
use super::output::{ScanLine, bytes, hottest, rate, whose, working_set_rows};
use crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use pageferry_tracker::working_set::Estimator;
use ratatui::layout::{Constraint, Layout};
use ratatui::style::{Style, Stylize};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Cell, Paragraph, Row, Sparkline, Table};
use ratatui::{DefaultTerminal, Frame};
use std::collections::VecDeque;
use std::io;
use std::time::Duration;

/// Scans that the sparkline can show.
const HISTORY: usize = 512;

/// The terminal, in its other screen. Dropping it gives the terminal back as it was; a panic does too.
pub(super) struct View {
    terminal: DefaultTerminal,
    state: State,
}

/// What is shown.
#[derive(Debug)]
pub(super) struct State {
    program: String,
    pid: i32,
    tracker: String,
    interval: Duration,
    link: Rate,
    scans: u64,
    last: Option<ScanLine>,
    history: VecDeque<u64>,
    recording: Option<String>,
}

impl State {
    pub(super) fn new(
        program: String,
        pid: i32,
        interval: Duration,
        link: Rate,
        recording: Option<String>,
    ) -> Self {
        Self {
            program,
            pid,
            tracker: "attaching".to_owned(),
            interval,
            link,
            scans: 0,
            last: None,
            history: VecDeque::new(),
            recording,
        }
    }

    pub(super) fn attached(&mut self, tracker: String) {
        self.tracker = tracker;
    }

    /// Takes in a scan.
    pub(super) fn observe(&mut self, line: ScanLine) {
        self.scans += 1;
        // The first scan is the base: no writes are known yet.
        if self.scans > 1 {
            self.history.push_back(line.dirty_pages);
            if self.history.len() > HISTORY {
                self.history.pop_front();
            }
        }
        self.last = Some(line);
    }

    fn draw(&self, frame: &mut Frame<'_>, estimator: &Estimator) {
        let [head, numbers, spark, regions, foot] = Layout::vertical([
            Constraint::Length(2),
            Constraint::Length(10),
            Constraint::Length(7),
            Constraint::Min(4),
            Constraint::Length(1),
        ])
        .areas(frame.area());
        frame.render_widget(self.head(), head);
        let [left, right] = Layout::horizontal([Constraint::Fill(1), Constraint::Fill(1)]).areas(numbers);
        frame.render_widget(self.rates(estimator), left);
        frame.render_widget(Self::windows(estimator), right);
        let room = usize::from(spark.width.saturating_sub(2));
        let data: Vec<u64> =
            self.history.iter().skip(self.history.len().saturating_sub(room)).copied().collect();
        let top = data.iter().max().copied().unwrap_or(0);
        let title = format!(" written in each scan (top: {}) ", bytes(top as f64));
        frame.render_widget(Sparkline::default().data(data).block(Block::bordered().title(title)), spark);
        frame.render_widget(Self::regions(estimator, usize::from(regions.height.saturating_sub(3))), regions);
        frame.render_widget(Paragraph::new(" q quits; the program never notices").dim(), foot);
    }

    fn head(&self) -> Paragraph<'_> {
        let at = self.last.as_ref().map_or(0, |line| line.at_us);
        let recording =
            self.recording.as_ref().map_or(String::new(), |path| format!("   recording to {path}"));
        Paragraph::new(vec![
            Line::from(vec![
                Span::from(format!(" {} ", self.program)).bold(),
                Span::from(format!("pid {}   {}", self.pid, self.tracker)),
            ]),
            Line::from(format!(
                " {}   {} scans, one every {}{recording}",
                Time(Duration::from_micros(at)),
                self.scans,
                Time(self.interval)
            )),
        ])
    }

    fn rates(&self, estimator: &Estimator) -> Table<'static> {
        let mut rows = Vec::new();
        if let Some(line) = &self.last {
            let whole = estimator.dirty_rate();
            rows = vec![
                ["in memory".to_owned(), of_which(line.populated_pages, line.shared_populated_pages)],
                ["written in the last scan".to_owned(), of_which(line.dirty_pages, line.shared_dirty_pages)],
                ["  for the first time".to_owned(), bytes(line.first_time_pages as f64).to_string()],
                ["  again".to_owned(), bytes(line.repeated_pages as f64).to_string()],
            ];
            if let Some(pages) = line.unchanged_pages {
                rows.push(["  with the same bytes".to_owned(), bytes(pages as f64).to_string()]);
            }
            rows.push(["dirty rate, whole run".to_owned(), rate(whole.total).to_string()]);
            rows.push([
                format!("hot set at {}", self.link),
                bytes(estimator.hot_set(self.link.0 as f64).total as f64).to_string(),
            ]);
            rows.push(["the scan took".to_owned(), Time(Duration::from_micros(line.took_us)).to_string()]);
        }
        let rows = rows.into_iter().map(|cells| Row::new(cells.map(Cell::from)));
        Table::new(rows, [Constraint::Length(30), Constraint::Fill(1)])
            .block(Block::bordered().title(" writes "))
    }

    fn windows(estimator: &Estimator) -> Table<'static> {
        let rows = working_set_rows(estimator).into_iter().map(Row::new);
        let widths = [Constraint::Length(10), Constraint::Length(12), Constraint::Fill(1)];
        Table::new(rows, widths).block(Block::bordered().title(" writable working set by window "))
    }

    fn regions(estimator: &Estimator, room: usize) -> Table<'static> {
        let rows = hottest(estimator).into_iter().filter(|region| region.populated + region.distinct > 0);
        let rows = rows.take(room).map(|region| {
            Row::new(vec![
                whose(region.pid, region.processes),
                region.kind.to_string(),
                region.name.clone(),
                format!("{:#x}", region.start << 12),
                bytes(region.populated as f64).to_string(),
                bytes(region.distinct as f64).to_string(),
                rate(region.pages_per_second).to_string(),
            ])
        });
        let widths = [
            Constraint::Length(10),
            Constraint::Length(13),
            Constraint::Fill(1),
            Constraint::Length(16),
            Constraint::Length(11),
            Constraint::Length(11),
            Constraint::Length(12),
        ];
        let head = ["pid", "kind", "name", "at", "in memory", "written", "dirty rate"];
        Table::new(rows, widths)
            .header(Row::new(head).style(Style::new().bold()))
            .block(Block::bordered().title(" regions, the busiest first "))
    }
}

/// All of it, and what of it is shared, if anything is.
fn of_which(pages: u64, shared: u64) -> String {
    match shared {
        0 => bytes(pages as f64).to_string(),
        _ => format!("{} ({} shared)", bytes(pages as f64), bytes(shared as f64)),
    }
}

impl View {
    /// Takes the terminal.
    pub(super) fn open(state: State) -> io::Result<Self> {
        Ok(Self { terminal: ratatui::try_init()?, state })
    }

    pub(super) fn state(&mut self) -> &mut State {
        &mut self.state
    }

    /// Shows what is known.
    pub(super) fn draw(&mut self, estimator: &Estimator) -> io::Result<()> {
        let state = &self.state;
        self.terminal.draw(|frame| state.draw(frame, estimator)).map(drop)
    }

    /// Whether the person wants to leave; waits for a key at most so long.
    pub(super) fn wants_to_leave(&mut self, patience: Duration) -> io::Result<bool> {
        if !event::poll(patience)? {
            return Ok(false);
        }
        Ok(match event::read()? {
            Event::Key(key) if key.kind == KeyEventKind::Press => match key.code {
                KeyCode::Char('q') | KeyCode::Esc => true,
                // In raw mode the terminal makes no signal of it.
                KeyCode::Char('c') => key.modifiers.contains(KeyModifiers::CONTROL),
                _ => false,
            },
            _ => false,
        })
    }
}

impl Drop for View {
    fn drop(&mut self) {
        ratatui::restore();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    #[test]
    fn an_empty_view_fits_any_terminal() {
        for (width, height) in [(1, 1), (20, 5), (80, 24), (200, 60)] {
            let mut terminal = Terminal::new(TestBackend::new(width, height)).expect("a test terminal");
            let state = State::new("redis".to_owned(), 7, Duration::from_secs(1), Rate(125_000_000), None);
            terminal.draw(|frame| state.draw(frame, &Estimator::new())).expect("it can be drawn");
        }
    }
}
