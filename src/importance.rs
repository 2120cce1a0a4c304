//! Importance matrices beside a model: which entry is whose, and how much they say.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;

use formats::{Imatrix, ImatrixEntry};

use crate::dialect::architectures::Architecture;
use crate::dialect::names::{self, ExportPlan, ExportTensor, From, Part};
use crate::error::{Error, Result};
use crate::graph::{Graph, Linear};
use crate::recipe::Recipe;
use crate::words::listed;

/// Tokens below which an importance matrix is called short: sixteen of llama.cpp's pieces of text.
const FEW_TOKENS: u64 = 8192;

/// A row of an imatrix.
#[derive(Clone, Debug)]
pub struct ImportancePlace {
    /// The tensor of a GGUF file whose inputs it is of.
    pub tensor: String,
    /// Values in a row.
    pub width: usize,
    /// Rows that the tensor has, one for each of its matrices.
    pub matrices: usize,
    /// Which of its matrices it is, counted from 0.
    pub matrix: usize,
    /// Its columns are rows of the model's matrix, and no inputs.
    reversed: bool,
    /// The order of the inputs in the file; their own without.
    columns: Option<Vec<usize>>,
}

impl ImportancePlace {
    /// What the inputs of a linear count, in the order of the file.
    pub fn ordered(&self, of_inputs: Vec<f32>) -> Vec<f32> {
        match &self.columns {
            Some(columns) => columns.iter().map(|column| of_inputs[*column]).collect(),
            None => of_inputs,
        }
    }

    /// That of one part of a tensor.
    pub fn of(tensor: &ExportTensor, part: usize) -> ImportancePlace {
        let ([_, width], matrices) = (tensor.extents(), tensor.matrices());
        let matrix = if matrices > 1 { part } else { 0 };
        let Part { transposed, columns, .. } = &tensor.parts()[part];
        let (reversed, columns) = (*transposed, columns.clone());
        ImportancePlace { tensor: tensor.gguf.clone(), width, matrices, matrix, reversed, columns }
    }
}

/// What an imatrix says of a model's inputs, and where one that is to be written keeps what is seen of them: by llama.cpp's names of
/// tensors, whatever the output calls them. Without an imatrix it is empty.
#[derive(Default)]
pub struct Importance {
    read: Option<(PathBuf, Imatrix)>,
    writes: bool,
    /// Of every linear by its module, of other matrices by their tensor: one for each part of a GGUF file's tensors that it becomes.
    places: HashMap<String, Vec<ImportancePlace>>,
    /// All tensors that llama.cpp has of the model.
    known: HashSet<String>,
}

impl Importance {
    /// Reads the file of a recipe for a model with these tensors.
    pub fn new(recipe: &Recipe, plan: &ExportPlan) -> Result<Importance> {
        let path = recipe.imatrix.as_ref().filter(|_| recipe.takes_imatrix());
        let read = path.map(|path| Ok::<_, Error>((path.clone(), Imatrix::read(path)?))).transpose()?;
        let mut places: HashMap<String, Vec<ImportancePlace>> = HashMap::new();
        for tensor in &plan.tensors {
            for (index, part) in tensor.parts().iter().enumerate() {
                let name = match &part.from {
                    From::Weight(linear) => linear.module.clone(),
                    From::Tensor(name, _) => name.clone(),
                    From::Bias(_) => continue,
                };
                places.entry(name).or_default().push(ImportancePlace::of(tensor, index));
            }
        }
        let known = plan.tensors.iter().map(|tensor| tensor.gguf.clone()).collect();
        Ok(Importance { read, writes: recipe.save_imatrix.is_some(), places, known })
    }

    /// The same for an output that has names of its own. Fails for a model that llama.cpp has no names for.
    pub fn of_graph(recipe: &Recipe, graph: &Graph) -> Result<Importance> {
        let (flag, path) = match (&recipe.imatrix, &recipe.save_imatrix) {
            (Some(path), _) if recipe.takes_imatrix() => ("--imatrix", path),
            (_, Some(path)) => ("--save-imatrix", path),
            _ => return Ok(Importance::default()),
        };
        let plan = names::plan(graph).map_err(|error| {
            let why = match (Architecture::of(graph), &graph.unrunnable) {
                (None, _) => format!("it has none for models of the family `{}`", graph.family),
                (_, Some(why)) => why.clone(),
                _ => error.to_string(),
            };
            let path = path.display();
            Error::usage(format!(
                "{flag} {path}: an imatrix goes by llama.cpp's names of tensors, and {why}; leave it out"
            ))
        })?;
        Importance::new(recipe, &plan)
    }

    /// The file that was read.
    pub fn file(&self) -> Option<&Imatrix> {
        self.read.as_ref().map(|(_, imatrix)| imatrix)
    }

    /// Forgets what was read, of which no use can be made; whether there was anything.
    pub fn forget(&mut self) -> bool {
        self.read.take().is_some()
    }

    /// What is read of a row; `None` without a file or an entry.
    pub fn at(&self, place: &ImportancePlace) -> Result<Option<Vec<f32>>> {
        let Some(imatrix) = self.file() else { return Ok(None) };
        let ImportancePlace { tensor, width, matrices, matrix, .. } = place;
        let Some(all) = imatrix.importance(tensor, matrices * width)? else { return Ok(None) };
        Ok(Some(all[matrix * width..][..*width].to_vec()))
    }

    /// What is read of a part of a linear or another matrix.
    pub fn of_part(&self, name: &str, part: usize) -> Result<Option<Vec<f32>>> {
        self.places[name].get(part).map_or(Ok(None), |place| self.at(place))
    }

    /// What is read of the inputs of a linear, or of the tensor of another matrix.
    pub fn of_whole(&self, name: &str) -> Result<Option<Vec<f32>>> {
        let Some(place) = self.place_of_whole(name) else { return Ok(None) };
        let Some(read) = self.at(place)? else { return Ok(None) };
        let Some(columns) = &place.columns else { return Ok(Some(read)) };
        let mut own = vec![0.0; read.len()];
        columns.iter().zip(read).for_each(|(column, x)| own[*column] = x);
        Ok(Some(own))
    }

    /// All parts of a linear read the same inputs: the first that was seen speaks for them.
    fn place_of_whole(&self, name: &str) -> Option<&ImportancePlace> {
        let all = || self.places.get(name).into_iter().flatten().filter(|place| !place.reversed);
        let entries = self.file().map(|imatrix| &imatrix.entries);
        let counted = |place: &&ImportancePlace| {
            entries.and_then(|all| all.get(&place.tensor)).is_some_and(|entry| count_of(entry, place.matrix) > 0.0)
        };
        all().find(counted).or_else(|| all().next())
    }

    /// Where an imatrix that is to be written keeps what the inputs of a linear look like.
    pub fn to_write(&self, module: &str) -> Vec<ImportancePlace> {
        let all = self.places.get(module).into_iter().flatten();
        all.filter(|place| self.writes && !place.reversed).cloned().collect()
    }

    /// Fails unless every entry that names one of the model's linears has its width, and some entry does. Returns what the user should
    /// know of those that are missing or say nothing.
    ///
    /// `whole` says that a linear is one thing to the output, whatever a GGUF file makes of it.
    pub fn check(&self, graph: &Graph, whole: bool) -> Result<Vec<String>> {
        let Some((path, imatrix)) = &self.read else { return Ok(Vec::new()) };
        let of = |linear: &'_ Linear| match whole {
            true => self.place_of_whole(&linear.module).into_iter().collect(),
            false => self.places[&linear.module].iter().collect::<Vec<_>>(),
        };
        let (mut all, mut without, mut unseen, mut flat) = (0, Vec::new(), Vec::new(), Vec::new());
        for linear in graph.linears() {
            let name = &*linear.module;
            // A linear may be in several places, as the keys and values of each head that are made of a latent.
            let (mut lacks, mut idle, mut equal, mut any) = (false, false, false, false);
            for place in of(linear) {
                any = true;
                match self.at(place)? {
                    None => lacks = true,
                    Some(_) if count_of(&imatrix.entries[&place.tensor], place.matrix) == 0.0 => idle = true,
                    Some(importance) => equal |= importance.len() > 1 && importance.iter().all(|x| *x == importance[0]),
                }
            }
            all += usize::from(any);
            match (lacks, idle, equal) {
                (true, ..) => without.push(name),
                (_, true, _) => unseen.push(name),
                (_, _, true) => flat.push(name),
                _ => {}
            }
        }
        let shown = path.display();
        if without.len() == all {
            return Err(Error::failed(format!(
                "{shown}: none of its {} entries is for a linear of this model; it was made for another one",
                imatrix.entries.len()
            )));
        }
        if without.len() + unseen.len() + flat.len() == all {
            return Err(Error::failed(format!(
                "{shown}: it tells the inputs of none of the model's {all} linears apart, as all are 0, equal or not counted; collect \
                 it again on text, or leave --imatrix out"
            )));
        }
        let mut notes = Vec::new();
        let mut tell = |names: &[&str], what: &str| {
            if !names.is_empty() {
                let (count, names) = (names.len(), listed(names));
                notes.push(format!(
                    "{shown}: {what} {count} of {all} linears ({names}), which were rounded as without importance"
                ));
            }
        };
        tell(&without, "it has no entry for");
        tell(&unseen, "it saw no token before");
        tell(&flat, "all inputs are equally important in its entries for");
        let others: Vec<&str> =
            imatrix.entries.keys().map(String::as_str).filter(|name| !self.known.contains(*name)).collect();
        if !others.is_empty() {
            notes.push(format!(
                "{shown}: {} of its {} entries ({}) are for tensors that this model does not have; it seems to be another model's",
                others.len(),
                imatrix.entries.len(),
                listed(&others)
            ));
        }
        let (chunks, tokens) = seen(imatrix);
        if tokens.map_or(chunks < 16, |tokens| tokens < FEW_TOKENS) {
            let found = tokens.map_or(format!("{chunks} pieces of text"), |tokens| format!("{tokens} tokens"));
            notes.push(format!(
                "{shown}: it was computed on {found}, which are few; the importance of inputs is a rough guess"
            ));
        }
        Ok(notes)
    }
}

/// How many inputs matrix `at` saw.
fn count_of(entry: &ImatrixEntry, at: usize) -> f32 {
    entry.counts.get(at).or(entry.counts.first()).copied().unwrap_or(0.0)
}

/// Pieces of text, and tokens where they are known.
fn seen(imatrix: &Imatrix) -> (u64, Option<u64>) {
    match (u64::from(imatrix.chunk_count), u64::from(imatrix.chunk_size)) {
        (0, _) => {
            let counts = imatrix.entries.values().flat_map(|entry| &entry.counts);
            (counts.fold(0.0f32, |most, count| most.max(*count)) as u64, None)
        }
        (chunks, 0) => (chunks, None),
        (chunks, size) => (chunks, Some(chunks * size)),
    }
}
