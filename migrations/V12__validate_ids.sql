-- What V10 added without looking at the rows. This takes a lock that lets everybody read and write.
alter table tasks validate constraint tasks_codebase_is_valid;
alter table tasks validate constraint tasks_target_worker_is_valid;
alter table tasks validate constraint tasks_agent_type_is_valid;
