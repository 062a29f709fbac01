-- task_cancel
-- The operators' function does it, so that both doors lead to the same. Null: there is no such task.
select cancel_task($1, $2) as status
