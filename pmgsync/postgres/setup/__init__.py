"""What pmgsync keeps in a database beside the data: made, checked, kept in order, removed."""
