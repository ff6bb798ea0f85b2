//! The tables of a space by their number, allocated many at a time: while memory is being made ready the
//! allocator's calls to the kernel wait for it, so there should be few of them.

use super::index::Table;
use std::collections::BTreeMap;

/// Tables allocated at once: 0.7 MiB of address space, of which only what is used becomes memory.
const SLAB: usize = 64;

#[derive(Debug, Default)]
pub(super) struct Tables {
    /// Where each table is.
    at: BTreeMap<u64, usize>,
    slabs: Vec<Vec<Table>>,
    /// Tables that are not used any more.
    free: Vec<usize>,
}

impl Tables {
    pub(super) fn len(&self) -> usize {
        self.at.len()
    }

    pub(super) fn contains(&self, number: u64) -> bool {
        self.at.contains_key(&number)
    }

    pub(super) fn get(&self, number: u64) -> Option<&Table> {
        self.at.get(&number).map(|&at| &self.slabs[at / SLAB][at % SLAB])
    }

    pub(super) fn get_mut(&mut self, number: u64) -> Option<&mut Table> {
        self.at.get(&number).map(|&at| &mut self.slabs[at / SLAB][at % SLAB])
    }

    /// The table; an empty one if there was none.
    pub(super) fn get_or_new(&mut self, number: u64) -> &mut Table {
        let (slabs, free) = (&mut self.slabs, &mut self.free);
        let at = *self.at.entry(number).or_insert_with(|| match free.pop() {
            Some(at) => {
                slabs[at / SLAB][at % SLAB] = Table::new();
                at
            }
            None => {
                if slabs.last().is_none_or(|slab| slab.len() == SLAB) {
                    slabs.push(Vec::with_capacity(SLAB));
                }
                let last = slabs.len() - 1;
                slabs[last].push(Table::new());
                last * SLAB + slabs[last].len() - 1
            }
        });
        &mut slabs[at / SLAB][at % SLAB]
    }

    pub(super) fn remove(&mut self, number: u64) {
        self.free.extend(self.at.remove(&number));
    }

    /// All tables, in order.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, &Table)> {
        self.at.iter().map(|(&number, &at)| (number, &self.slabs[at / SLAB][at % SLAB]))
    }

    /// The numbers of the tables in a range.
    pub(super) fn numbers(&self, range: std::ops::Range<u64>) -> Vec<u64> {
        if range.is_empty() { Vec::new() } else { self.at.range(range).map(|(&number, _)| number).collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_found_in_order_and_their_places_used_again() {
        let mut tables = Tables::default();
        for number in (0..200).rev() {
            tables.get_or_new(number).held.set(number as usize);
        }
        tables.remove(7);
        tables.remove(7);
        assert!(!tables.contains(7) && tables.get(7).is_none() && tables.get_mut(7).is_none());
        assert!(tables.get_or_new(1000).held.is_empty(), "a used place is cleared");
        assert_eq!((tables.len(), tables.slabs.len()), (200, 4));
        let numbers: Vec<u64> = tables.iter().map(|(number, _)| number).collect();
        assert_eq!(numbers, (0..7).chain(8..200).chain([1000]).collect::<Vec<_>>());
        assert!((8..200).all(|number| tables.get(number).unwrap().held.has(number as usize)));
        assert_eq!(tables.numbers(5..10), [5, 6, 8, 9]);
    }
}
