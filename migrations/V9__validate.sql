-- What V7 and V8 added without looking at the rows. This takes a lock that lets everybody read and write.
alter table tasks validate constraint tasks_codebase_is_valid;
alter table tasks validate constraint tasks_target_worker_is_valid;
alter table tasks validate constraint tasks_agent_type_is_valid;
alter table tasks validate constraint tasks_capabilities_are_valid;
alter table tasks validate constraint tasks_status_is_known;
alter table tasks validate constraint tasks_claim_outcome_is_known;
alter table tasks validate constraint tasks_finished_has_time;
alter table tasks validate constraint tasks_times_are_in_range;
alter table streams validate constraint streams_slots_range;
