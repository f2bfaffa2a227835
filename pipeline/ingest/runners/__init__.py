"""Beam runners, and the job as a pipeline on one of them. Imported only where the job runs: Beam takes seconds."""
